"""One chart, from numbers to the coordinates of an SVG. Pure: the template `chart.svg` draws what is computed here.

Series are told apart by colour, and by dashes and marks as well. Every chart has its numbers as a table beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 300  # of the drawing, in the units of the SVG
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 46  # margins: the plot's area lies within
STYLES = 6  # colours, dashes and marks that the template has
TICKS = 5  # about as many on an axis


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one name, in the order of x."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Tick:
    """A value on an axis, as text, and where it is in the drawing."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Drawn:
    """One series in the drawing: `style` from 0 on, and either points that a line joins, single points, or bars."""

    name: str
    style: int
    points: tuple[tuple[float, float], ...] = ()
    joined: bool = False
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Chart:
    """What the template draws. `rows` are the numbers as text, a column for x and one for each series."""

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    drawn: tuple[Drawn, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def series_of(records: Sequence[dict], x: str, y: str, by: str | None = None, name: str = "") -> list[Series]:
    """`records` as series, one for each value of the field `by`, in the order in which they come."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        groups.setdefault(str(record[by]) if by else name, []).append((record[x], record[y]))
    return [Series(group, tuple(sorted(points))) for group, points in groups.items()]


def line_chart(
    key: str, title: str, x_label: str, y_label: str, series: Sequence[Series], joined: bool = True
) -> Chart | None:
    """Points by x, joined by lines or not. None without points. The y axis begins at 0."""
    found = [point for each in series for point in each.points if all(map(math.isfinite, point))]
    if not found:
        return None
    first, last = min(x for x, _ in found), max(x for x, _ in found)
    whole = all(float(x).is_integer() for x, _ in found)
    across = _Scale(first, last, LEFT, WIDTH - RIGHT)
    y_values = _ticks(0, max(y for _, y in found))
    up = _Scale(0, y_values[-1], HEIGHT - BOTTOM, TOP)
    drawn = [
        Drawn(
            each.name,
            number % STYLES,
            points=tuple((across(x), up(y)) for x, y in each.points if math.isfinite(y)),
            joined=joined,
        )
        for number, each in enumerate(series)
    ]
    x_ticks = [Tick(across(value), number_text(value)) for value in _ticks(first, last, whole) if first <= value <= last]
    return _chart(key, title, x_label, y_label, x_ticks, y_values, up, drawn, series)


def bar_chart(key: str, title: str, x_label: str, y_label: str, series: Sequence[Series]) -> Chart | None:
    """Bars by x, those of the series on top of one another. None without values. Values are 0 or more."""
    places = sorted({x for each in series for x, _ in each.points})
    if not places:
        return None
    values = [dict(each.points) for each in series]
    heights = [sum(value.get(place, 0.0) for value in values) for place in places]
    y_values = _ticks(0, max(heights))
    up = _Scale(0, y_values[-1], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT) / len(places)
    below = [0.0] * len(places)
    drawn = []
    for number, (each, value) in enumerate(zip(series, values, strict=True)):
        bars = []
        for index, place in enumerate(places):
            low, high = below[index], below[index] + value.get(place, 0.0)
            below[index] = high
            bars.append(Bar(round(LEFT + (index + 0.12) * step, 2), up(high), round(0.76 * step, 2), up(low) - up(high)))
        drawn.append(Drawn(each.name, number % STYLES, bars=tuple(bars)))
    every = math.ceil(len(places) / 12)  # more labels than that touch one another
    x_ticks = [
        Tick(round(LEFT + (index + 0.5) * step, 2), number_text(place))
        for index, place in enumerate(places)
        if index % every == 0
    ]
    return _chart(key, title, x_label, y_label, x_ticks, y_values, up, drawn, series)


def number_text(value: float) -> str:
    """A number for people: whole ones in full with commas, others to four digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _chart(
    key: str,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: list[Tick],
    y_values: list[float],
    up: "_Scale",
    drawn: list[Drawn],
    series: Sequence[Series],
) -> Chart:
    columns = [dict(each.points) for each in series]
    places = sorted({x for column in columns for x in column})
    rows = [
        (number_text(place), *(number_text(column[place]) if place in column else "" for column in columns))
        for place in places
    ]
    return Chart(
        key=key,
        title=title,
        description=_description(y_label, series),
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple(x_ticks),
        y_ticks=tuple(Tick(up(value), number_text(value)) for value in y_values),
        drawn=tuple(drawn),
        header=(x_label, *(each.name for each in series)),
        rows=tuple(rows),
    )


def _description(y_label: str, series: Sequence[Series]) -> str:
    """The chart in words, for those who do not see it."""
    parts = []
    for each in series:
        values = [y for _, y in each.points if math.isfinite(y)]
        if values:
            parts.append(f"{each.name}: {number_text(min(values))} to {number_text(max(values))}")
    return f"{y_label}. {'; '.join(parts)}."


class _Scale:
    """From values `low` to `high` to places `start` to `end`. Equal values lie in the middle."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return round((self.start + self.end) / 2, 2)
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round values from `low` or below to `high` or above, by 1, 2 or 5 times a power of ten; `whole` ones if asked for."""
    span = high - low or abs(high) or 1.0
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(begin, max(end, begin + 1) + 1)]

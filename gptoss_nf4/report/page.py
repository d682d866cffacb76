"""The report as one HTML file: text, tables and charts of what the stages wrote. It loads nothing from anywhere."""

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from gptoss_nf4.report.chart import Chart, Series, bar_chart, line_chart, number_text, series_of
from gptoss_nf4.report.facts import Facts

NOTHING = "-"  # in a cell without a value


def page(facts: Facts) -> str:
    """The report of `facts`. Every text in it is escaped: names may come from a stranger's checkpoint."""
    environment = Environment(
        loader=PackageLoader("gptoss_nf4.report"),
        autoescape=True,
        undefined=StrictUndefined,  # a name that a template has wrong is an error, not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "size": size, "percent": percent}
    return environment.get_template("page.html").render(facts=facts, charts=charts(facts))


def charts(facts: Facts) -> dict[str, Chart]:
    """The charts by name; one without data is not there."""
    by_module = {"x": "layer", "by": "series"}
    drawn = [
        bar_chart("sizes", "Size by layer", "layer", "MB", series_of(facts.sizes, y="megabytes", **by_module)),
        line_chart(
            "absmax-mean", "Mean absmax by layer", "layer", "mean absmax", series_of(facts.absmax, y="mean", **by_module)
        ),
        line_chart(
            "absmax-largest",
            "Largest absmax by layer",
            "layer",
            "largest absmax",
            series_of(facts.absmax, y="largest", **by_module),
        ),
        bar_chart(
            "seconds", "Seconds by layer", "layer", "seconds", series_of(facts.layer_seconds, y="seconds", **by_module)
        ),
        line_chart(
            "positions",
            "Difference in log-probability by position",
            "token",
            "largest difference",
            _positions(facts.positions),
            joined=False,
        ),
        line_chart(
            "speed",
            "Output tokens per second by requests in flight",
            "requests in flight",
            "tokens per second",
            series_of((facts.benchmark or {}).get("batches", []), "batch", "output_tokens_per_second", name=facts.name),
        ),
    ]
    return {chart.key: chart for chart in drawn if chart is not None}


def _positions(records: Sequence[dict]) -> list[Series]:
    """Positions where vLLM's first choice is transformers', and those where it is another."""
    named = [
        record | {"choice": "same first choice" if record["same_choice"] else "other first choice"} for record in records
    ]
    return sorted(series_of(named, "position", "difference", by="choice"), key=lambda each: each.name, reverse=True)


def number(value: object) -> str:
    """A number for people; what is none stays what it is."""
    if value is None:
        return NOTHING
    return number_text(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def size(bytes_: int) -> str:
    """A size in the unit that gives it one to three digits before the point."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= factor:
            return f"{bytes_ / factor:.2f} {unit}"
    return f"{bytes_} bytes"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.4g} %"

"""All values of one measurement, and what to say of them."""

import statistics
from dataclasses import dataclass

WIDE = 0.10  # a spread above which a median says little
LEGEND = f"median (smallest-largest); ! marks a spread, (largest - smallest) / median, above {WIDE:.0%}"


@dataclass(frozen=True)
class Values:
    """Measured one after another; at least one."""

    each: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.each) - min(self.each)) / self.median

    @property
    def wide(self) -> bool:
        return self.spread > WIDE

    def text(self, digits: int) -> str:
        """As LEGEND says, with `digits` after the point."""
        smallest, largest = min(self.each), max(self.each)
        return f"{self.median:.{digits}f} ({smallest:.{digits}f}-{largest:.{digits}f}){'!' if self.wide else ''}"

    def rates(self, count: float) -> "Values":
        """`count` divided by each of the values."""
        return Values(tuple(count / value for value in self.each))

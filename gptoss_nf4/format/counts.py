"""Counts that are gathered piece by piece."""

from dataclasses import dataclass, fields
from typing import Self


@dataclass
class Counts:
    """A dataclass of numbers whose sum is that of each field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

"""Counts that are gathered piece by piece and then added."""

from dataclasses import dataclass, fields
from typing import Self


@dataclass
class Counts:
    """Base of dataclasses of numbers: `+` adds field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

"""Comparing values: pure functions on tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

INTERLEAVED = "interleaved"  # gate in the even rows, up in the odd ones (transformers `modeling_gpt_oss.py`)
CONCATENATED = "concatenated"  # all rows of gate, then all rows of up
# Quantizing again moves a row of weights by 8 to 15 % of its length. An unrelated row is at least as far away as zero is.
UNRELATED = 0.9


@dataclass(frozen=True)
class Difference:
    """Values compared and those that differ, their largest difference, and the rows that have nothing in common."""

    compared: int = 0
    different: int = 0
    largest_difference: float = 0.0
    unrelated_rows: int = 0

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.compared + other.compared,
            self.different + other.different,
            max(self.largest_difference, other.largest_difference),
            self.unrelated_rows + other.unrelated_rows,
        )


def difference(before: torch.Tensor, after: torch.Tensor) -> Difference:
    """Compare [rows, columns] after rounding `before` to the dtype of `after`, any floating ones. NaN equals nothing."""
    before = before.to(after.dtype)
    if _equal(before, after):
        return Difference(before.numel())
    error = before.float() - after.float()
    unrelated = ~(error.norm(dim=1) <= UNRELATED * before.float().norm(dim=1))
    return Difference(
        before.numel(),
        int((before != after).sum()),
        float(error.abs().nan_to_num(nan=torch.inf).max()),
        int(unrelated.sum()),
    )


def _equal(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether all values are equal. Of float32, which most are, NumPy says so in a quarter of torch.equal's time."""
    if before.shape == after.shape and before.dtype == torch.float32:
        return np.array_equal(before.numpy(), after.numpy())
    return torch.equal(before, after)


def places(order: str, rows: int, first: int) -> Iterator[tuple[slice, int]]:
    """Where the source's rows from `first` on, an even number, lie in a result of `order`: (those rows, their first place).

    `rows` counts all rows of one expert, gate and up.
    """
    if order == INTERLEAVED:
        yield slice(None), first
    elif order == CONCATENATED:
        yield slice(0, None, 2), first // 2
        yield slice(1, None, 2), (rows + first) // 2
    else:
        raise ValueError(f"{order=}")

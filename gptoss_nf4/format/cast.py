"""Casting to another floating dtype, with a count of what that loses."""

from dataclasses import dataclass

import torch

from gptoss_nf4.format.counts import Counts


@dataclass
class CastCounts(Counts):
    """Values that a cast lost: finite ones that became infinite, non-zero ones that became zero, and bad ones."""

    values: int = 0
    overflow: int = 0
    underflow: int = 0
    non_finite: int = 0


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, CastCounts]:
    """`tensor` (any floating dtype and shape) in `dtype`, and what was lost."""
    after = tensor.to(dtype)
    counts = CastCounts(values=tensor.numel())
    if not torch.isfinite(after).all():  # finite results have finite origins: one look at most tensors
        finite = torch.isfinite(tensor)
        counts.non_finite = int((~finite).sum())
        counts.overflow = int((finite & ~torch.isfinite(after)).sum())
    if tensor.dtype != dtype:
        counts.underflow = int(torch.count_nonzero(tensor) - torch.count_nonzero(after))
    return after, counts

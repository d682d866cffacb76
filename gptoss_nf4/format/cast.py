"""Casting to another floating dtype, with a count of what that loses."""

from dataclasses import dataclass

import torch

from gptoss_nf4.format.counts import Counts


@dataclass
class CastCounts(Counts):
    """What casting `values` values lost.

    `overflow` counts finite values that became infinite, `underflow` non-zero ones that became zero, and `non_finite`
    those that were NaN or infinite before.
    """

    values: int = 0
    overflow: int = 0
    underflow: int = 0
    non_finite: int = 0


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, CastCounts]:
    """Return `tensor` (any floating dtype and shape) in `dtype`, and what that lost. Nothing is raised."""
    after = tensor.to(dtype)
    counts = CastCounts(values=tensor.numel())
    # A finite result had a finite origin, so most tensors need this one look. The largest is NaN where any value is; and to
    # find it takes a ninth of the time of torch.isfinite for all.
    if tensor.numel() and not torch.isfinite(after.abs().amax()):
        finite = torch.isfinite(tensor)
        counts.non_finite = int((~finite).sum())
        counts.overflow = int((finite & ~torch.isfinite(after)).sum())
    if tensor.dtype != dtype:
        counts.underflow = int(torch.count_nonzero(tensor) - torch.count_nonzero(after))
    return after, counts

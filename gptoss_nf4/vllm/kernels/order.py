"""Bringing activations into `tiles.operand_order` for the kernels of `large`."""

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import start_early
from gptoss_nf4.vllm.kernels.lora import early_launch
from gptoss_nf4.vllm.kernels.start import cdiv, start_kernel

PAIRS = 512  # of a program


# Each of these by the other would be 40 to 90 instructions more in the kernels that use it.
@triton.jit
def natural(place):
    """Which input stands at a place of `tiles.operand_order`: there (q e h t p), here (q t e h p)."""
    p, t, h, e = place % 2, place // 2 % 4, place // 8 % 2, place // 16 % 2
    return place // 32 * 32 + t * 8 + e * 4 + h * 2 + p


@triton.jit
def natural_pair(place):
    """The same, both counted in pairs of inputs."""
    t, h, e = place % 4, place // 4 % 2, place // 8 % 2
    return place // 16 * 16 + t * 4 + e * 2 + h


@triton.jit
def _order(x, out, HALF, PAIRS: tl.constexpr, EARLY: tl.constexpr):
    """out[row] = x[row] with its inputs in the other order. Pairs of inputs stay together (p).

    Grid: rows, blocks of PAIRS.

    Args:
        x, out: [rows, 2 HALF] of 16 bits; HALF is the number of pairs in a row.
        EARLY: the kernel is started before the one in front of it has ended, see `ahead`.
    """
    start_early(EARLY)
    place = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    exists = place < HALF
    place += tl.program_id(0).to(tl.int64) * HALF  # rows are whole groups of 16 pairs
    pair = tl.load(x.to(tl.pointer_type(tl.int32)) + natural_pair(place), mask=exists)
    tl.store(out.to(tl.pointer_type(tl.int32)) + place, pair, mask=exists)


def in_operand_order(x: torch.Tensor, *, early: bool = False) -> torch.Tensor:
    """`tiles.operand_order` for wgmma.

    Args:
        x: [rows, in] float16 or bfloat16, contiguous; in is a multiple of 32.
        early: the kernel may start before the one in front of it has ended, see `ahead`.

    Returns:
        [rows, in], new, in x's dtype.
    """
    rows, inputs = x.shape
    out = torch.empty(rows, inputs, dtype=x.dtype, device=x.device)
    grid = rows, cdiv(inputs // 2, PAIRS)  # rows first: CUDA takes 65,535 at most of the second
    start_kernel(_order, grid, x, out, HALF=inputs // 2, PAIRS=PAIRS, EARLY=early, num_warps=4, **early_launch(early))
    return out

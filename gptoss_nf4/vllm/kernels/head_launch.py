"""Starting the kernels of `head` and `head_large`: `linear` and `dequantize` on a weight in 12 bits.

Only `flaw` waits for the GPU or looks at a tensor's values, so all else may be captured in a CUDA graph.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl

from gptoss_nf4.vllm.kernels import head, head_large
from gptoss_nf4.vllm.kernels.plan import Gpu, gpu_of
from gptoss_nf4.vllm.kernels.start import cdiv, next_power_of_2, start_kernel
from gptoss_nf4.vllm.kernels.tiles import MAX_INPUTS, ROWS, operand_order
from gptoss_nf4.vllm.kernels.twelve_bits import SHIFTS, TwelveBits

DENSE_ROWS = 8192  # of the weight, that are unpacked at a time where cuBLAS multiplies: 47 MB of gpt-oss's head
INPUT_TILES = 4  # of a program that unpacks


class Weight(NamedTuple):
    """A `TwelveBits` as a kernel takes it."""

    words: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    places: torch.Tensor
    escapes: torch.Tensor
    unscale: float
    """By which sums of products are multiplied."""
    N: int
    """Rows."""
    K: int
    """Inputs."""
    C: int
    """Input tiles."""
    SHIFT: tl.constexpr
    """`twelve_bits.SHIFTS`."""


@dataclass(frozen=True)
class Few:
    """How `head.product` runs: its warps share the inputs."""

    rows: int
    """Of activations, of a program: 8, 16 or 32."""
    warps: int
    tiles: int
    """Row tiles of a program, 1 or 2."""


@dataclass(frozen=True)
class Many:
    """How `head_large.product` runs: its warps share the row tiles."""

    rows: int
    """Of activations, of a program: 16 to 128."""
    warps: int
    """4: with 8, which are two warpgroups, some logits were wrong on a GPU (NOTES.md)."""
    tiles: int
    """Row tiles of a program, a power of two, at least `warps`."""
    stages: int
    """A program reads stages - 1 input tiles ahead."""


Plan = Few | Many
MAX_ROWS = 256  # of activations; beyond, a dense copy and cuBLAS are faster, part by part
VARIANTS = (8, 16, 32, 64, 128)  # numbers of rows whose plans are all that there are


def plan_product(rows: int, gpu: Gpu) -> Plan | None:
    """For `rows` rows of activations; None: unpack parts of the weight, and cuBLAS."""
    if rows <= 8:
        return Few(rows=8, warps=2, tiles=2)
    if rows <= 16:
        return Few(rows=16, warps=2, tiles=1)
    if rows > MAX_ROWS:
        return None
    if not gpu.wgmma:  # with more rows or tiles there are not enough registers
        return Few(rows=32, warps=2, tiles=2) if rows <= 32 else Many(rows=64, warps=4, tiles=4, stages=3)
    # A row tile for each warp: with two, 32 lanes meet in one bank of shared memory.
    return Many(rows=min(next_power_of_2(rows), 128), warps=4, tiles=4, stages=4)


def linear(x: torch.Tensor, packed: TwelveBits, bias: torch.Tensor | None = None, plan: Plan | None = None) -> torch.Tensor:
    """A linear layer.

    Waits for nothing and looks at no value, so it may be captured in a CUDA graph.

    Args:
        x: [rows, in] in the weight's dtype.
        packed: the weight [out, in].
        bias: [out] in the weight's dtype, or None.
        plan: in place of what `plan_product` chooses.

    Returns:
        [rows, out] in the weight's dtype.
    """
    rows, inputs = x.shape
    if x.dtype != packed.dtype or inputs != packed.inputs:
        raise TypeError(f"x of {x.dtype} [{rows}, {inputs}], expected {packed.dtype} [rows, {packed.inputs}]")
    out = torch.empty(rows, packed.rows, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    plan = plan or plan_product(rows, gpu_of(x.device))
    if plan is None:
        linear_in_parts(x, packed, out)
    else:
        _launch(plan, x.contiguous(), packed, out)
    return out if bias is None else out.add_(bias)


def _launch(plan: Plan, x: torch.Tensor, packed: TwelveBits, out: torch.Tensor) -> None:
    weight, rows, row_tiles = kernel_weight(packed), len(x), len(packed.table)
    blocks = cdiv(rows, plan.rows)
    grid = (blocks * cdiv(row_tiles, plan.tiles),)
    if isinstance(plan, Few):
        options = {"BM": plan.rows, "WARPS": plan.warps, "TWO": plan.tiles == 2, "num_warps": plan.warps}
        start_kernel(head.product, grid, x, weight, out, count=rows, blocks=blocks, R=row_tiles, **options)
    else:
        wgmma = gpu_of(x.device).wgmma
        columns = x.new_empty(weight.K, blocks * plan.rows)  # with rows that are not stored, so that all loads are whole
        columns[:, :rows] = x.t()
        x = operand_order(x, MAX_INPUTS, wgmma)
        options = {"BM": plan.rows, "TILES": plan.tiles, "STAGES": plan.stages, "WGMMA": wgmma, "num_warps": plan.warps}
        sizes = {"count": rows, "blocks": blocks, "padded": columns.shape[1], "R": row_tiles}
        start_kernel(head_large.product, grid, x, columns, weight, out, **sizes, **options)


def linear_in_parts(x: torch.Tensor, packed: TwelveBits, out: torch.Tensor) -> None:
    """out [rows, out_features] = x times the weight, of which `DENSE_ROWS` rows are dense at a time."""
    part = torch.empty(min(DENSE_ROWS, len(packed.table) * ROWS), packed.inputs, dtype=x.dtype, device=x.device)
    for first in range(0, packed.rows, DENSE_ROWS):
        rows = min(DENSE_ROWS, packed.rows - first)
        _dequantize_rows(packed, first, part[:rows])
        torch.mm(x, part[:rows].t(), out=out[:, first : first + rows])


def dequantize(packed: TwelveBits, first: int = 0, rows: int | None = None) -> torch.Tensor:
    """The dense weight, or `rows` of its rows from row `first` on, a multiple of 16: bit for bit what was packed."""
    rows = packed.rows - first if rows is None else rows
    out = torch.empty(rows, packed.inputs, dtype=packed.dtype, device=packed.words.device)
    _dequantize_rows(packed, first, out)
    return out


def _dequantize_rows(packed: TwelveBits, first: int, out: torch.Tensor) -> None:
    weight, tile = kernel_weight(packed), first // ROWS
    scaled = packed.scale != 1
    row_tiles = cdiv(len(out), ROWS)
    grid = (row_tiles, cdiv(weight.C, INPUT_TILES))
    rows = {"first": tile, "count": len(out)}
    start_kernel(head.unpack, grid, weight, out, **rows, TILES=INPUT_TILES, SCALED=scaled, num_warps=4)
    start_kernel(head.unpack_escapes, (row_tiles,), weight, out, **rows, SCALED=scaled, num_warps=1)


def kernel_weight(packed: TwelveBits) -> Weight:
    """`packed` as the kernels take it."""
    return Weight(
        words=packed.words,
        table=packed.table,
        starts=packed.starts,
        places=packed.places,
        escapes=packed.escapes,
        unscale=1 / packed.scale,
        N=packed.rows,
        K=packed.inputs,
        C=packed.inputs // MAX_INPUTS,
        SHIFT=tl.constexpr(SHIFTS[packed.dtype]),
    )


def flaw(packed: TwelveBits, weight: torch.Tensor) -> str | None:
    """What the kernels get wrong on this machine, in a few words; None if they give the bits of `weight`, which was packed.

    All of the weight is unpacked, and each variant of both products multiplies it by unit vectors: the results are columns
    of the weight. So every variant is compiled when this returns.
    """
    for first in range(0, packed.rows, DENSE_ROWS):
        dense = weight[first : first + DENSE_ROWS]
        unpacked = dequantize(packed, first, len(dense))
        if not torch.equal(unpacked.view(torch.int16), dense.view(torch.int16)):
            return f"unpacking rows {first} to {first + len(dense)} gives other bits"
    for plan in dict.fromkeys(plan_product(rows, gpu_of(weight.device)) for rows in VARIANTS):
        assert plan is not None, "every variant is a kernel's"
        # In float64: vLLM's default dtype while it loads may be bfloat16, which has no 2879.
        columns = torch.linspace(0, packed.inputs - 1, plan.rows, dtype=torch.float64, device=weight.device).long()
        x = torch.zeros(plan.rows, packed.inputs, dtype=weight.dtype, device=weight.device)
        x[torch.arange(plan.rows, device=weight.device), columns] = 1
        if not torch.equal(linear(x, packed, plan=plan), weight[:, columns].t()):
            return f"{plan.rows} unit vectors times the weight are not its columns"
    return None

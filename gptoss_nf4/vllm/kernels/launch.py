"""Choosing and starting the kernels: `linear` and `experts` on packed weights.

No function here waits for the GPU or looks at a tensor's values, so all may be captured in a CUDA graph.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from gptoss_nf4.format.dimensions import SWIGLU_ALPHA, SWIGLU_LIMIT
from gptoss_nf4.vllm.kernels import dense, large, small
from gptoss_nf4.vllm.kernels.codebook import SHARED_BYTES, Codebook, codebook
from gptoss_nf4.vllm.kernels.combine import sum_slots
from gptoss_nf4.vllm.kernels.tiles import ABSMAX_FACTOR, ROWS, operand_order

INTERPRETED = triton.knobs.runtime.interpret


class Tiling(NamedTuple):
    """How one product runs: `warps` share a program's inputs, in row tiles by `pair`s or alone (`small`); or warps is 0,
    and the kernels of `large` read `stages` - 1 blocks ahead."""

    warps: int
    stages: int = 3
    pair: bool = True


@dataclass(frozen=True)
class Plan:
    """How the experts run: activation rows of a program, and the two products."""

    rows: int
    w13: Tiling
    w2: Tiling


class Routing(NamedTuple):
    """Slots (token * top_k + choice) sorted by expert, as vLLM's `moe_align_block_size` returns them.

    `slots` int32 [padded]: a multiple of the block for each expert, filled up with the number of slots; `experts` int32
    [blocks]: local expert of each block, -1 for another rank's; `padded_count` int32 [1]: slots in use. Where each slot
    is a block of its own, `slots` and `padded_count` are None.
    """

    slots: torch.Tensor | None
    experts: torch.Tensor
    padded_count: torch.Tensor | None


class Packed(NamedTuple):
    """A weight in the order of `tiles`: codes int32 [E, R, C, 32, S], absmax float16 [E, R, blocks, 16], bias [E, 16 R]."""

    codes: torch.Tensor
    absmax: torch.Tensor
    bias: torch.Tensor | None
    blocksize: int
    quant_type: str


LARGE = Tiling(0)
# Of a multiprocessor, for six programs of four warps, as many as their registers allow, with a table each.
SHARED_LIMIT = 6 * (SHARED_BYTES + 2048)
MAX_LINEAR_ROWS = 64  # beyond, a dense copy of the weight and cuBLAS are faster


def plan_linear(rows: int) -> tuple[int, Tiling]:
    """Activation rows of a program and the product's tiling, for at most MAX_LINEAR_ROWS."""
    if rows <= 8:
        return 8, Tiling(8, pair=False)
    return 16 if rows <= 32 else 32, Tiling(4, pair=False)


def plan_experts(tokens: int, top_k: int, experts: int, device: torch.device) -> Plan:
    """By the mean number of rows of an expert; measured on an H100 (NOTES.md)."""
    mean = tokens * top_k / experts
    if mean <= 8:
        return Plan(8 if mean <= 4 else 16, Tiling(4), Tiling(4))
    if mean <= 128 or not _has_wgmma(device):  # 128 rows: mma.sync would not have the registers
        return Plan(32 if mean <= 24 else 64, LARGE, LARGE)
    return Plan(128, Tiling(0, stages=4), Tiling(0, stages=4))


def _has_wgmma(device: torch.device) -> bool:
    """Hopper's matrix instructions; Triton compiles the same products to mma.sync elsewhere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _shape(weight: Packed) -> dict:
    if weight.codes.dtype != torch.int32 or weight.absmax.dtype != torch.float16:
        raise TypeError(f"packed weight of {weight.codes.dtype} and {weight.absmax.dtype}, not int32 and float16")
    _, row_tiles, input_tiles, _, words = weight.codes.shape
    inputs = words * ROWS
    return {
        "row_tiles": row_tiles, "input_tiles": input_tiles, "absmax_stride": weight.absmax.shape[-2],
        "PER_ABSMAX": max(1, weight.blocksize // inputs), "S": words,
    }  # fmt: skip


def _inverse(book: Codebook) -> float:
    """What a product of packed weights is multiplied by."""
    return 1 / (book.factor * ABSMAX_FACTOR)


def _small_options(tiling: Tiling, rows: int, device: torch.device) -> dict:
    """Weights are decoded by the table in shared memory where that has room for enough programs, else by permutes."""
    shared = _shared_memory(device) >= SHARED_LIMIT
    capped = {"maxnreg": 80} if shared and rows == 8 and not INTERPRETED else {}
    return capped | {
        "BM": rows, "WARPS": tiling.warps, "PAIR": tiling.pair, "SHARED": shared, "ASM": not INTERPRETED,
        "num_warps": tiling.warps,
    }  # fmt: skip


def _large_options(tiling: Tiling, rows: int, device: torch.device) -> dict:
    return {
        "BM": rows, "STAGES": tiling.stages, "WGMMA": _has_wgmma(device), "ASM": not INTERPRETED,
        "num_warps": large.ROW_TILES.value,
    }  # fmt: skip


def _small_grid(row_tiles: int, blocks: int, tiling: Tiling) -> tuple[int, int]:
    return triton.cdiv(row_tiles, 1 + tiling.pair), blocks


def linear(x: torch.Tensor, weight: Packed, out_features: int, plan: tuple[int, Tiling] | None = None) -> torch.Tensor:
    """x [rows, in] float16 or bfloat16 -> [rows, out_features] in x's dtype, with bias where the weight has one."""
    rows, inputs = x.shape
    if plan is None and rows > MAX_LINEAR_ROWS:
        bias = None if weight.bias is None else weight.bias[0, :out_features]
        return torch.nn.functional.linear(x, dequantize(weight, out_features, x.dtype), bias)
    x = x.contiguous()
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    block, tiling = plan or plan_linear(rows)
    book, shape = codebook(weight.quant_type, x.dtype, x.device), _shape(weight)
    unused = out  # for pointers that the kernel does not touch without experts
    small.product[_small_grid(shape["row_tiles"], triton.cdiv(rows, block), tiling)](
        x, weight.codes, weight.absmax, unused if weight.bias is None else weight.bias, book.table, _inverse(book), out,
        unused, unused, unused, unused, rows, 1, inputs, out_features, ALPHA=SWIGLU_ALPHA, LIMIT=SWIGLU_LIMIT,
        GATED=False, EXPERTS=False, SORTED=False, HAS_BIAS=weight.bias is not None,
        **shape, **_small_options(tiling, block, x.device),
    )  # fmt: skip
    return out


def _shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def dequantize(weight: Packed, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [out_features, in] of a packed one [1, ...] in `dtype` (float16 or bfloat16)."""
    book, shape = codebook(weight.quant_type, dtype, weight.codes.device), _shape(weight)
    inputs = shape["input_tiles"] * shape["S"] * ROWS
    out = torch.empty(out_features, inputs, dtype=dtype, device=weight.codes.device)
    tiles = 4
    dense.dequantize[(shape["row_tiles"], triton.cdiv(shape["input_tiles"], tiles))](
        weight.codes, weight.absmax, book.table, _inverse(book), out, out_features, inputs, **shape,
        TILES=tiles, ASM=not INTERPRETED, num_warps=4,
    )  # fmt: skip
    return out


def experts(
    x: torch.Tensor, topk_weights: torch.Tensor, routing: Routing, w13: Packed, w2: Packed, plan: Plan
) -> torch.Tensor:
    """The weighted sum of each token's experts.

    Args:
        x: [tokens, hidden] float16 or bfloat16.
        topk_weights: float32 [tokens, k].
        routing: slots for blocks of `plan.rows`.
        w13: gate and up tiles in turn: codes [E, 2 R, C, 32, S]. w2: rows of hidden. Both with bias.

    Returns:
        [tokens, hidden] in x's dtype; slots of other ranks' experts add nothing.
    """
    x = x.contiguous()
    tokens, hidden = x.shape
    top_k = topk_weights.shape[1]
    if not plan.w13.warps:
        x = operand_order(x, w13.codes.shape[-1] * ROWS)
    middle = swiglu_experts(x, top_k, routing, w13, w2.codes.shape[2] * w2.codes.shape[4] * ROWS, plan.rows, plan.w13)
    # Few slots: their sum in float32 costs nothing. Many: half the bytes.
    dtype = torch.float32 if plan.w2.warps else x.dtype
    partial = down_experts(middle, topk_weights, routing, w2, hidden, plan.rows, plan.w2, dtype)
    return sum_slots(partial.view(tokens, top_k, hidden), x.dtype)


def swiglu_experts(
    x: torch.Tensor, top_k: int, routing: Routing, w13: Packed, intermediate: int, block: int, tiling: Tiling
) -> torch.Tensor:
    """x [tokens, hidden] -> [tokens * top_k, intermediate]; rows of other ranks' experts are not written."""
    slots = x.shape[0] * top_k
    out = torch.empty(slots, intermediate, dtype=x.dtype, device=x.device)
    if tiling.warps:
        return _small_experts(x, top_k, routing, w13, None, out, block, tiling)
    book, shape = codebook(w13.quant_type, x.dtype, x.device), _shape(w13)
    shape["row_tiles"] //= 2
    large.swiglu_experts[(triton.cdiv(shape["row_tiles"], large.ROW_TILES.value), routing.experts.shape[0])](
        x, w13.codes, w13.absmax, w13.bias, book.table, _inverse(book), out, *routing, slots, top_k,
        x.shape[1], intermediate, ALPHA=SWIGLU_ALPHA, LIMIT=SWIGLU_LIMIT, **shape,
        **_large_options(tiling, block, x.device),
    )  # fmt: skip
    return out


def down_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, routing: Routing, w2: Packed, hidden: int, block: int, tiling: Tiling,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """x [slots, intermediate] -> [slots, hidden] in `dtype`, times topk_weights; zeros for other ranks' experts."""
    out = torch.empty(x.shape[0], hidden, dtype=dtype, device=x.device)
    if tiling.warps:
        return _small_experts(x, 1, routing, w2, topk_weights, out, block, tiling)
    book, shape = codebook(w2.quant_type, x.dtype, x.device), _shape(w2)
    large.down_experts[(triton.cdiv(shape["row_tiles"], large.ROW_TILES.value), routing.experts.shape[0])](
        x, w2.codes, w2.absmax, w2.bias, book.table, _inverse(book), out, *routing, x.shape[0],
        topk_weights, x.shape[1], hidden, **shape, **_large_options(tiling, block, x.device),
    )  # fmt: skip
    return out


def _small_experts(
    x: torch.Tensor, top_k: int, routing: Routing, weight: Packed, topk_weights: torch.Tensor | None, out: torch.Tensor,
    block: int, tiling: Tiling,
) -> torch.Tensor:  # fmt: skip
    """`small.product` for experts, gated where there are no topk_weights."""
    book, shape = codebook(weight.quant_type, x.dtype, x.device), _shape(weight)
    slots, experts, padded_count = routing
    small.product[_small_grid(shape["row_tiles"], experts.shape[0], tiling)](
        x, weight.codes, weight.absmax, weight.bias, book.table, _inverse(book), out,
        experts if slots is None else slots, experts, experts if slots is None else padded_count,
        out if topk_weights is None else topk_weights, out.shape[0], top_k, x.shape[1], out.shape[1],
        ALPHA=SWIGLU_ALPHA, LIMIT=SWIGLU_LIMIT, GATED=topk_weights is None, EXPERTS=True, SORTED=slots is not None,
        HAS_BIAS=True, **shape, **_small_options(tiling, block, x.device),
    )  # fmt: skip
    return out

"""Products with few rows of activations: decoding of a batch, one token and up.

The kernels are `linear`, `swiglu_experts` and `down_experts`. A program computes one or two tiles of 16 output rows, for
up to `BM` rows of activations. They share the loop, `products.products`, and differ before and after it. What adapters
add is computed there, see `lora`.

Names end in the letters of their axes, see `tiles`.
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import start_early
from gptoss_nf4.vllm.kernels.decode import fill_shared, load_table
from gptoss_nf4.vllm.kernels.lora import wait_for_t
from gptoss_nf4.vllm.kernels.products import Rows, products
from gptoss_nf4.vllm.kernels.routing import choice_of_token
from gptoss_nf4.vllm.kernels.swiglu import clamped_swiglu

# Row tiles of a program: a gate and an up tile, or two neighbours.
SWIGLU_TILES = 2
DOWN_TILES = 2


@triton.jit(do_not_specialize=["count"])
def linear(
    x,
    weight,
    lora,
    out,
    count,
    K,
    N,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """out[row] = w @ x[row] + bias.

    A program takes one row tile; the grid is row tiles, blocks of BM rows of x.

    Args:
        x: [count, K] float16 or bfloat16. out: [count, N] in its own dtype.
        weight: a `Weight` of one expert. lora: a `lora.Lora` or None.
        SHARED_TABLE: decode by `lookup`, else by `decode`.
        EARLY: the kernel is started before the one in front of it has ended, see `ahead`. AHEAD: prefetch weights.
    """
    tile = tl.program_id(0)
    row_m = tl.program_id(1) * BM + tl.arange(0, BM)
    row_m = tl.where(row_m < count, row_m, -1)
    rows = Rows(x, row_m, 1, K)
    decoder = fill_shared(weight.table) if SHARED_TABLE else load_table(weight.table)
    sum_nm, _ = products(rows, weight, lora, 0, tile, decoder, WARPS, SHARED_TABLE, False, False, EARLY, AHEAD)
    _store(out, sum_nm, row_m, tile, N)


@triton.jit(do_not_specialize=["count"])
def swiglu_experts(
    x,
    weight,
    lora,
    out,
    routing,
    count,
    top_k,
    K,
    N,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[slot] = clamped SwiGLU of w[expert] @ x[slot // top_k] + bias[expert].

    A program takes a gate and an up tile; the grid is row tiles / 2, blocks of slots. Slots of another rank's experts
    are not written.

    Args:
        x: [tokens, K] float16 or bfloat16. out: [count, N] in its own dtype.
        weight: a `Weight` with tiles of gate and of up rows in turn. lora: a `lora.Lora` or None.
        routing: a `Routing` for blocks of BM.
        count: the number of slots, tokens * top_k.
    """
    pair, block = tl.program_id(0), tl.program_id(1)
    decoder = fill_shared(weight.table) if SHARED_TABLE else load_table(weight.table)
    start_early(EARLY)
    if routing.slots is not None and block * BM >= tl.load(routing.padded_count):
        wait_for_t(lora)
        return
    expert = _expert(routing, block, top_k)
    if expert < 0:
        wait_for_t(lora)
        return
    slot_m = _slots(routing, block, count, BM)
    rows = Rows(x, slot_m, top_k, K)
    gate_nm, up_nm = products(rows, weight, lora, expert, 2 * pair, decoder, WARPS, SHARED_TABLE, True, True, False, False)
    _store(out, clamped_swiglu(gate_nm, up_nm), slot_m, pair, N)


@triton.jit(do_not_specialize=["count"])
def down_experts(
    x,
    weight,
    lora,
    out,
    routing,
    slot_weights,
    count,
    K,
    N,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[slot] = (w[expert] @ x[slot] + bias[expert]) * slot_weights[slot].

    A program takes two row tiles; the grid is row tiles / 2, blocks of slots. Slots of another rank's experts get zeros.

    Args:
        x: [count, K] float16 or bfloat16. out: [count, N] in its own dtype.
        weight: a `Weight`. lora: a `lora.Lora` or None. routing: a `Routing` for blocks of BM.
        slot_weights: float32 [count]; None where `routing` has logits, which say them too.
        count: the number of slots.
    """
    tile, block = 2 * tl.program_id(0), tl.program_id(1)
    decoder = fill_shared(weight.table) if SHARED_TABLE else load_table(weight.table)
    if routing.slots is not None and block * BM >= tl.load(routing.padded_count):
        wait_for_t(lora)
        start_early(EARLY)
        return
    expert = _expert(routing, block, count)
    slot_m = _slots(routing, block, count, BM)
    if expert < 0:
        wait_for_t(lora)
        start_early(EARLY)
        zeros_nm = tl.zeros([16, BM], tl.float32)
        _store(out, zeros_nm, slot_m, tile, N)
        _store(out, zeros_nm, slot_m, tile + 1, N)
        return
    rows = Rows(x, slot_m, 1, K)
    first_nm, second_nm = products(
        rows, weight, lora, expert, tile, decoder, WARPS, SHARED_TABLE, True, False, EARLY, False
    )
    weight_m = _weights(routing, slot_weights, block, slot_m, count)
    _store(out, first_nm * weight_m[None, :], slot_m, tile, N)
    _store(out, second_nm * weight_m[None, :], slot_m, tile + 1, N)


@triton.jit
def _expert(routing, block, top_k):
    """The local expert of a block of slots, int64, -1 for another rank's."""
    if routing.logits is not None:
        expert, _ = choice_of_token(routing.logits, block, top_k, routing.E)
    else:
        expert = tl.load(routing.experts + block)
    return expert.to(tl.int64)


@triton.jit
def _weights(routing, slot_weights, block, slot_m, count):
    """The routing weights of a block's slots, float32 [m]."""
    if routing.logits is not None:
        _, weight = choice_of_token(routing.logits, block, count, routing.E)
        weight_m = tl.where(slot_m >= 0, weight, 0.0)
    else:
        weight_m = tl.load(slot_weights + slot_m, mask=slot_m >= 0, other=0.0)
    return weight_m


@triton.jit
def _slots(routing, block, count, BM: tl.constexpr):
    """The slots of a block, int32 [m]; -1 where there is none."""
    m = tl.arange(0, BM)
    slot_m = tl.load(routing.slots + block * BM + m) if routing.slots is not None else tl.where(m == 0, block, count)
    return tl.where(slot_m < count, slot_m, -1)


@triton.jit
def _store(out, value_nm, slot_m, tile, N):
    """float32 [n, m] to out[slot, row of tile]."""
    n = tile * 16 + tl.arange(0, 16)
    valid_nm = (slot_m >= 0)[None, :] & (n < N)[:, None]
    tl.store(out + slot_m.to(tl.int64)[None, :] * N + n[:, None], value_nm.to(out.dtype.element_ty), mask=valid_nm)

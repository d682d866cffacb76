"""Products with many rows of activations for each expert: prefill, and decoding of large batches.

A program computes 64 gate and 64 up rows, or 128 neighbouring ones, for `BM` rows of activations. Weights are
decoded in registers, multiplied by absmax there, and go from there into the product as operand A, see `operands`. To
dequantize whole experts to memory instead would mean to write and read four times the bytes. On Hopper the products are
`wgmma`, on Ampere `mma.sync`.

wgmma runs beside other instructions, but only where nothing else writes its sums until it is waited for. If the loop
might not run at all, the compiler sets them to zero on that way behind the loop, and then waits for each product before
the next. So the kernels say that there is an input tile.

The kernels are `swiglu_experts`, `down_experts` and `linear`. All take activations in the order of `tiles.operand_order`.
The first two take the arguments of their namesakes in `small`, but sorted slots only. What adapters add comes after the
loop. A linear layer has few row tiles for a whole GPU, so programs share its inputs too, and `combine.sum_slots` adds up
what they found.

Names end in the letters of their axes, see `tiles`. Here R is the four row tiles of a program, and n its 64 rows, (R r g).
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import start_early
from gptoss_nf4.vllm.kernels.decode import fill_shared, load_table
from gptoss_nf4.vllm.kernels.lora import add_delta
from gptoss_nf4.vllm.kernels.operands import activations, tiles_from, weights
from gptoss_nf4.vllm.kernels.swiglu import clamped_swiglu

WARPS = 4  # of a program
ROW_TILES = tl.constexpr(WARPS)  # of each of the two sums that a program holds
# Row tiles of a program: gate and up, or neighbours.
SWIGLU_TILES = 2 * WARPS
DOWN_TILES = 2 * WARPS


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
    STAGES: tl.constexpr,
    WGMMA: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[slot] = clamped SwiGLU of w[expert] @ x[slot // top_k] + bias[expert].

    A program takes four gate and four up tiles; the grid is row tiles / 8, blocks of slots. Slots of another rank's
    experts are not written.

    Args:
        x: [tokens, K] float16 or bfloat16. out: [count, N]. Both in `tiles.operand_order`.
        weight: a `Weight` with tiles of gate and of up rows in turn. lora: a `lora.Lora` or None.
        routing: a `Routing` for blocks of BM, with slots.
        count: the number of slots, tokens * top_k.
        STAGES: a program reads STAGES - 1 input tiles ahead.
        WGMMA: Triton compiles the products to wgmma, else to mma.sync.
        SHARED_TABLE: decode by `lookup`, else by `decode`.
        EARLY: the kernel is started before the one in front of it has ended, see `ahead`.
    """
    start_early(EARLY)
    block = tl.program_id(1)
    if block * BM >= tl.load(routing.padded_count):
        return
    expert = tl.load(routing.experts + block).to(tl.int64)
    if expert < 0:
        return
    slot_m = tl.load(routing.slots + block * BM + tl.arange(0, BM))
    used_m = slot_m < count
    row_m = (slot_m // top_k).to(tl.int64)
    pairs = weight.R // 2  # of a gate and an up tile
    pair_R = tl.program_id(0) * ROW_TILES + tl.arange(0, ROW_TILES)
    exists_R = pair_R < pairs
    first = expert * pairs * 2
    dtype: tl.constexpr = x.dtype.element_ty
    decoder = fill_shared(weight.table) if SHARED_TABLE else load_table(weight.table)
    gate_tiles, up_tiles = tiles_from(weight, expert, first), tiles_from(weight, expert, first + 1)
    gate_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    up_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    tl.assume(weight.C > 0)  # see above
    for C in tl.range(0, weight.C, num_stages=STAGES):
        x_km = activations(x, row_m, used_m, C, K, weight.S, WGMMA)
        gate_nk = weights(gate_tiles, 2 * pair_R, exists_R, C, weight, decoder, dtype, BM, WGMMA, SHARED_TABLE)
        gate_nm = tl.dot(gate_nk, x_km, gate_nm)
        up_nk = weights(up_tiles, 2 * pair_R, exists_R, C, weight, decoder, dtype, BM, WGMMA, SHARED_TABLE)
        up_nm = tl.dot(up_nk, x_km, up_nm)
    n = tl.program_id(0) * (ROW_TILES * 16) + tl.arange(0, ROW_TILES * 16)
    exists_n = n < pairs * 16
    bias_n = weight.bias + first * 16 + (n // 16) * 32 + n % 16
    gate_nm = gate_nm * weight.unscale + tl.load(bias_n, mask=exists_n, other=0.0).to(tl.float32)[:, None]
    up_nm = up_nm * weight.unscale + tl.load(bias_n + 16, mask=exists_n, other=0.0).to(tl.float32)[:, None]
    if lora is not None:
        gate_nm = add_delta(gate_nm, lora, expert, 2 * n, 0, slot_m, used_m)
        up_nm = add_delta(up_nm, lora, expert, 2 * n + 1, 0, slot_m, used_m)
    value_nm = clamped_swiglu(gate_nm, up_nm).to(out.dtype.element_ty)
    # These rows are the inputs of the second product. Bring them into `tiles.operand_order`.
    value_qtehpm = tl.reshape(value_nm, [ROW_TILES // 2, 4, 2, 2, 2, BM])
    value_qehtpm = tl.permute(value_qtehpm, [0, 2, 3, 1, 4, 5])
    value_nm = tl.reshape(value_qehtpm, [ROW_TILES * 16, BM])
    out_mn = out + slot_m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_mn, tl.trans(value_nm), mask=used_m[:, None] & (n < N)[None, :])


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
    STAGES: tl.constexpr,
    WGMMA: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[slot] = (w[expert] @ x[slot] + bias[expert]) * slot_weights[slot].

    A program takes eight row tiles; the grid is row tiles / 8, blocks of slots. Slots of another rank's experts get zeros.

    Args:
        x: [count, K] float16 or bfloat16, in `tiles.operand_order`. out: [count, N] in its own dtype.
        weight: a `Weight`. lora: a `lora.Lora` or None. routing: a `Routing` for blocks of BM, with slots.
        slot_weights: float32 [count].
        count: the number of slots.
        STAGES, WGMMA, SHARED_TABLE, EARLY: as in `swiglu_experts`.
    """
    start_early(EARLY)
    block = tl.program_id(1)
    first_tile = tl.program_id(0) * (2 * ROW_TILES)
    if block * BM >= tl.load(routing.padded_count):
        return
    expert = tl.load(routing.experts + block).to(tl.int64)
    slot_m = tl.load(routing.slots + block * BM + tl.arange(0, BM))
    slot_m = tl.where(slot_m < count, slot_m, -1)
    if expert < 0:
        zeros_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
        _store_rows(out, zeros_nm, first_tile, slot_m, N)
        _store_rows(out, zeros_nm, first_tile + ROW_TILES, slot_m, N)
        return
    sum_nm, next_nm = _sums(x, weight, expert, first_tile, slot_m, 0, weight.C, K, BM, STAGES, WGMMA, SHARED_TABLE)
    used_m = slot_m >= 0
    weight_m = tl.load(slot_weights + slot_m.to(tl.int64), mask=used_m, other=0.0)
    _store_rows(out, _finished(sum_nm, weight, lora, expert, first_tile, slot_m, weight_m), first_tile, slot_m, N)
    first_tile += ROW_TILES
    _store_rows(out, _finished(next_nm, weight, lora, expert, first_tile, slot_m, weight_m), first_tile, slot_m, N)


@triton.jit(do_not_specialize=["count", "parts"])
def linear(
    x,
    weight,
    out,
    count,
    parts,
    K,
    N,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    WGMMA: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[row, part] = w @ x[row] over a part of the inputs; in part 0, plus bias.

    A program takes eight row tiles; the grid is row tiles / 8, parts, blocks of BM rows of x.

    Args:
        x: [count, K] float16 or bfloat16, in `tiles.operand_order`. out: [count, parts, N] in its own dtype.
        weight: a `Weight` of one expert.
        parts: among which the input tiles are shared; no more than those.
        STAGES, WGMMA, SHARED_TABLE, EARLY: as in `swiglu_experts`.
    """
    start_early(EARLY)
    first_tile = tl.program_id(0) * (2 * ROW_TILES)
    part = tl.program_id(1)
    row_m = tl.program_id(2) * BM + tl.arange(0, BM)
    row_m = tl.where(row_m < count, row_m, -1)
    begin, end = part * weight.C // parts, (part + 1) * weight.C // parts
    sum_nm, next_nm = _sums(x, weight, 0, first_tile, row_m, begin, end, K, BM, STAGES, WGMMA, SHARED_TABLE)
    place_m = tl.where(row_m >= 0, row_m * parts + part, -1)
    biases = tl.where(part == 0, weight.R * 16, 0)
    _store_rows(out, _biased(sum_nm, weight, 0, first_tile, biases), first_tile, place_m, N)
    first_tile += ROW_TILES
    _store_rows(out, _biased(next_nm, weight, 0, first_tile, biases), first_tile, place_m, N)


@triton.jit
def _sums(
    x,
    weight,
    expert,
    first_tile,
    row_m,
    begin,
    end,
    K,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    WGMMA: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
):
    """Eight row tiles of an expert times x[row] over the input tiles from `begin` to `end`: twice float32 [n, m].

    Row -1 stands for zeros.
    """
    used_m = row_m >= 0
    row_m = row_m.to(tl.int64)
    tile_R = first_tile + tl.arange(0, ROW_TILES)
    exists_R = tile_R < weight.R
    next_R = tile_R + ROW_TILES
    next_exists_R = next_R < weight.R
    dtype: tl.constexpr = x.dtype.element_ty
    decoder = fill_shared(weight.table) if SHARED_TABLE else load_table(weight.table)
    tiles = tiles_from(weight, expert, expert * weight.R)
    sum_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    next_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    tl.assume(begin < end)  # see above
    for C in tl.range(begin, end, num_stages=STAGES):
        x_km = activations(x, row_m, used_m, C, K, weight.S, WGMMA)
        weight_nk = weights(tiles, tile_R, exists_R, C, weight, decoder, dtype, BM, WGMMA, SHARED_TABLE)
        sum_nm = tl.dot(weight_nk, x_km, sum_nm)
        next_nk = weights(tiles, next_R, next_exists_R, C, weight, decoder, dtype, BM, WGMMA, SHARED_TABLE)
        next_nm = tl.dot(next_nk, x_km, next_nm)
    return sum_nm, next_nm


@triton.jit
def _finished(sum_nm, weight, lora, expert, first_tile, slot_m, weight_m):
    """Four row tiles of `down_experts` from their sums, float32 [n, m]."""
    value_nm = _biased(sum_nm, weight, expert, first_tile, weight.R * 16)
    if lora is not None:
        n = first_tile * 16 + tl.arange(0, ROW_TILES * 16)
        value_nm += add_delta(tl.zeros_like(sum_nm), lora, expert, n, 0, slot_m, slot_m >= 0) * lora.scale
    return value_nm * weight_m[None, :]


@triton.jit
def _biased(sum_nm, weight, expert, first_tile, biases):
    """Four row tiles from their sums, float32 [n, m], with the bias of rows below `biases`."""
    value_nm = sum_nm * weight.unscale
    if weight.bias is not None:
        n = first_tile * 16 + tl.arange(0, ROW_TILES * 16)
        bias_n = tl.load(weight.bias + expert * weight.R * 16 + n, mask=n < biases, other=0.0)
        value_nm += bias_n.to(tl.float32)[:, None]
    return value_nm


@triton.jit
def _store_rows(out, value_nm, first_tile, slot_m, N):
    """Four row tiles, float32 [n, m], to out[slot]; nothing for slot -1."""
    n = first_tile * 16 + tl.arange(0, ROW_TILES * 16)
    out_mn = out + slot_m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_mn, tl.trans(value_nm.to(out.dtype.element_ty)), mask=(slot_m >= 0)[:, None] & (n < N)[None, :])

"""Products with few activation rows per weight: decoding of a batch, one token and up.

Each program takes two tiles (16 rows each) of outputs, a gate and an up tile or two neighbours, and up to `BM`
activation rows. Its warps share the inputs: warp i multiplies blocks i, i + warps, ... on tensor cores, weights as
operand A, so that the instruction's 16 rows are weights and only its 8 columns are padded. Both operands go from memory
to the registers of the lane that needs them, one block ahead of their use: the loop touches shared memory for the
codebook only and has no barrier. The 16 x 8 sums of one tile are scaled by absmax in float32, once per 64 weights. The
warps' sums are added at the end, in shared memory.
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.codebook import fill_shared, lookup
from gptoss_nf4.vllm.kernels.swiglu import clamped_swiglu


@triton.jit
def _load(
    x, rows, row_ok, K, codes, absmax, codes2, absmax2, block, input_tiles,
    PER_ABSMAX: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What block `block` [WARPS] of the inputs needs: both tiles' words, their absmax, and x[rows].

    Beyond the last tile the last one is read again, with absmax 0: one minimum instead of masks on all loads.
    """
    place = tl.minimum(block, input_tiles - 1)
    words = place[:, None, None] * (32 * S) + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :]
    scales = (place // PER_ABSMAX)[:, None] * 16 + tl.arange(0, 16)[None, :]
    exists = (block < input_tiles)[:, None]
    # Each warp's part of x lies in the last dimensions but for halves of a tile and groups of 8 rows: Triton spreads
    # lanes and warps from the last dimension on, so that a lane's 8 inputs of a row are what it holds as operand B.
    half = tl.arange(0, S // 2)
    k = place[None, None, :, None, None] * (16 * S) + half[:, None, None, None, None] * 32 + tl.arange(0, 32)
    row = tl.reshape(rows, [1, BM // 8, 1, 8, 1])
    ok = tl.reshape(row_ok, [1, BM // 8, 1, 8, 1])
    return (
        tl.load(codes + words),
        tl.load(codes2 + words),
        tl.load(absmax + scales, mask=exists, other=0.0),
        tl.load(absmax2 + scales, mask=exists, other=0.0),
        tl.load(x + row * K + k, mask=ok, other=0.0),
    )


@triton.jit
def _operand(value, BM: tl.constexpr, S: tl.constexpr):
    """x [S / 2, BM / 8, WARPS, 8, 32] as operand B [WARPS, 16 S, BM], its inputs in the order of `_partial`."""
    WARPS: tl.constexpr = value.shape[2]
    value = tl.reshape(value, [S // 2, BM // 8, WARPS, 8, 4, 2, 2, 2])  # s_hi n_hi w n_lo t s_lo h p
    value = tl.permute(value, [2, 0, 5, 4, 6, 7, 1, 3])  # w | s_hi s_lo t h p | n_hi n_lo
    return tl.reshape(value, [WARPS, 16 * S, BM])


@triton.jit
def _partial(word, scale, x, table, column, S: tl.constexpr, ASM: tl.constexpr):
    """One tile per warp times x, scaled: float32 [WARPS, 16, BM]."""
    WARPS: tl.constexpr = word.shape[0]
    weight = lookup(word, table, column, x.dtype, ASM)
    weight = tl.permute(tl.reshape(weight, [WARPS, 8, 4, S, 2, 2, 2]), [0, 5, 1, 3, 2, 6, 4])  # g t s p r h -> r g s t h p
    return tl.dot(tl.reshape(weight, [WARPS, 16, 16 * S]), x) * scale[:, :, None]


@triton.jit
def _two_tiles(
    x, rows, row_ok, K, codes, absmax, codes2, absmax2, table, input_tiles,
    BM: tl.constexpr, PER_ABSMAX: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr,
    PAIR: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Two row tiles (one and zeros if not PAIR) times x[rows]: float32 [16, BM] each, times the codebook's factor."""
    warp = tl.arange(0, WARPS)
    w1, w2, s1, s2, xs = _load(x, rows, row_ok, K, codes, absmax, codes2, absmax2, warp, input_tiles, PER_ABSMAX, S, BM)
    column = fill_shared(table, ASM)
    first = tl.zeros([WARPS, 16, BM], tl.float32)
    second = tl.zeros([WARPS, 16, BM], tl.float32)
    for start in tl.range(0, input_tiles, WARPS, num_stages=1):
        xb = _operand(xs, BM, S)
        c1, c2, d1, d2 = w1, w2, s1, s2
        w1, w2, s1, s2, xs = _load(
            x, rows, row_ok, K, codes, absmax, codes2, absmax2, start + WARPS + warp, input_tiles, PER_ABSMAX, S, BM
        )
        first += _partial(c1, d1, xb, table, column, S, ASM)
        if PAIR:
            second += _partial(c2, d2, xb, table, column, S, ASM)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def _rows_of(slots, first, count, BM: tl.constexpr, SORTED: tl.constexpr):
    """The slots of one program and which of them exist: BM sorted ones, or slot `first` alone."""
    m = tl.arange(0, BM)
    if SORTED:
        slot = tl.load(slots + first * BM + m)
        return slot, slot < count
    return tl.zeros_like(m) + first, m == 0


@triton.jit
def swiglu_experts(
    x, codes, absmax, bias, table, inverse_factor, out,
    slots, experts, padded_count, count, top_k,
    K, N, row_tiles, input_tiles, absmax_stride,
    PER_ABSMAX: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr, SORTED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[slot] = clamped SwiGLU of (w13[expert] @ x[slot // top_k] + bias[expert]).

    Args:
        x: [tokens, K]. out: [slots, N]. Both float16 or bfloat16.
        codes, absmax: packed w13, tiles of gate and of up rows in turn: int32 [E, 2 row_tiles, input_tiles, 32, S] and
            float32 [E, 2 row_tiles, absmax_stride, 16]. bias: [E, 2 row_tiles * 16], in the same order of rows.
        slots, experts, padded_count: vLLM's `moe_align_block_size` for blocks of BM; if not SORTED, `experts` has one
            (local) expert a slot. Expert -1 is another rank's: its slots are left alone.
    """
    tile = tl.program_id(0)
    first = tl.program_id(1)
    if SORTED and first * BM >= tl.load(padded_count):
        return
    expert = tl.load(experts + first).to(tl.int64)
    if expert < 0:
        return
    slot, slot_ok = _rows_of(slots, first, count, BM, SORTED)
    gate_codes = codes + (expert * row_tiles + tile) * 2 * input_tiles * (32 * S)
    gate_absmax = absmax + (expert * row_tiles + tile) * 2 * absmax_stride * 16
    g, u = _two_tiles(
        x, slot // top_k, slot_ok, K, gate_codes, gate_absmax, gate_codes + input_tiles * (32 * S),
        gate_absmax + absmax_stride * 16, table, input_tiles, BM, PER_ABSMAX, S, WARPS, True, ASM,
    )  # fmt: skip
    row = tl.arange(0, 16)
    biases = bias + (expert * row_tiles + tile) * 32 + row
    g = g * inverse_factor + tl.load(biases).to(tl.float32)[:, None]
    u = u * inverse_factor + tl.load(biases + 16).to(tl.float32)[:, None]
    value = clamped_swiglu(g, u, ALPHA, LIMIT)
    n = tile * 16 + row
    tl.store(
        out + slot.to(tl.int64)[None, :] * N + n[:, None], value.to(out.dtype.element_ty),
        mask=slot_ok[None, :] & (n < N)[:, None],
    )  # fmt: skip


@triton.jit
def matmul(
    x, codes, absmax, bias, table, inverse_factor, out,
    slots, experts, padded_count, count, slot_weights,
    K, N, row_tiles, input_tiles, absmax_stride,
    PER_ABSMAX: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr,
    PAIR: tl.constexpr, EXPERTS: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """out[row] = w @ x[row] + bias; with EXPERTS (w[expert] @ x[slot] + bias[expert]) * slot_weights[slot].

    Args:
        x: [rows, K]. out: [rows, N] in its own dtype.
        codes, absmax: int32 [E, row_tiles, input_tiles, 32, S], float32 [E, row_tiles, absmax_stride, 16].
        bias: [E, row_tiles * 16].
        slots, experts, padded_count, slot_weights: as in `swiglu_experts`; unused without EXPERTS. The slots of another
            rank's experts get zeros.
    """
    tile = tl.program_id(0) * (2 if PAIR else 1)
    first = tl.program_id(1)
    expert = tl.zeros([], tl.int64)
    if EXPERTS:
        if SORTED and first * BM >= tl.load(padded_count):
            return
        expert = tl.load(experts + first).to(tl.int64)
        slot, slot_ok = _rows_of(slots, first, count, BM, SORTED)
    else:
        slot = first * BM + tl.arange(0, BM)
        slot_ok = slot < count
    n = tile * 16 + tl.arange(0, 16)
    outputs = out + slot.to(tl.int64)[None, :] * N + n[:, None]
    out_ok = slot_ok[None, :] & (n < N)[:, None]
    out_ok2 = slot_ok[None, :] & (n + 16 < N)[:, None]
    if expert < 0:
        zeros = tl.zeros([16, BM], out.dtype.element_ty)
        tl.store(outputs, zeros, mask=out_ok)
        if PAIR:
            tl.store(outputs + 16, zeros, mask=out_ok2)
        return
    tile_codes = codes + (expert * row_tiles + tile) * input_tiles * (32 * S)
    tile_absmax = absmax + (expert * row_tiles + tile) * absmax_stride * 16
    has_second = (tile + 1 < row_tiles).to(tl.int32)  # else the first tile again, and nothing of it is stored
    value, value2 = _two_tiles(
        x, slot, slot_ok, K, tile_codes, tile_absmax, tile_codes + has_second * input_tiles * (32 * S),
        tile_absmax + has_second * absmax_stride * 16, table, input_tiles,
        BM, PER_ABSMAX, S, WARPS, PAIR, ASM,
    )  # fmt: skip
    value *= inverse_factor
    value2 *= inverse_factor
    if HAS_BIAS:
        biases = bias + expert * row_tiles * 16 + n
        value += tl.load(biases).to(tl.float32)[:, None]
        value2 += tl.load(biases + has_second * 16).to(tl.float32)[:, None]
    if EXPERTS:
        weights = tl.load(slot_weights + slot, mask=slot_ok, other=0.0)[None, :]
        value *= weights
        value2 *= weights
    tl.store(outputs, value.to(out.dtype.element_ty), mask=out_ok)
    if PAIR:
        tl.store(outputs + 16, value2.to(out.dtype.element_ty), mask=out_ok2)

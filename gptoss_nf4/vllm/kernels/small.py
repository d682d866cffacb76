"""Products with few activation rows per weight: decoding of a batch, one token and up.

Each program takes two tiles (16 rows each) of outputs, a gate and an up tile or two neighbours, and up to `BM`
activation rows. Its warps share the inputs: warp i multiplies blocks i, i + warps, ... on tensor cores, weights as
operand A, so that the instruction's 16 rows are weights and only its 8 columns are padded. Both operands go from memory
to the registers of the lane that needs them, one block ahead of their use: the loop touches shared memory for the
codebook at most and has no barrier. The 16 x 8 sums of one tile are scaled by absmax in float32, once per 64 weights.
The warps' sums are added at the end, in shared memory.
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.codebook import decode, fill_shared, halves, load_table, lookup
from gptoss_nf4.vllm.kernels.swiglu import clamped_swiglu


@triton.jit
def _load(
    x, slot, top_k, K, codes, absmax, second, block, input_tiles, absmax_stride,
    PER_ABSMAX: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What block `block` [WARPS] of the inputs needs: words [WARPS, 32, S] and pairs of absmax [WARPS, 8] of two row tiles
    (the first one again if `second` is 0), and x[slot // top_k] [S / 2, BM / 8, WARPS, 8, 32], zeros for slots below 0.

    Beyond the last block that one is read again, with absmax 0: one minimum instead of masks on all loads.
    """
    place = tl.minimum(block, input_tiles - 1)
    words = place[:, None, None] * (32 * S) + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :]
    scales = (place // PER_ABSMAX)[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists = (block < input_tiles)[:, None]
    # Each warp's part of x lies in the last dimensions but for halves of a block and groups of 8 rows: Triton spreads
    # lanes and warps from the last dimension on, so that a lane's 8 inputs of a row are what it holds as operand B.
    half = tl.arange(0, S // 2)
    k = place[None, None, :, None, None] * (16 * S) + half[:, None, None, None, None] * 32 + tl.arange(0, 32)
    slot = tl.reshape(slot, [1, BM // 8, 1, 8, 1])
    # Weights are read once, x by every program: they should not push it out of the L1 cache.
    return (
        tl.load(codes + words, eviction_policy="evict_first"),
        tl.load(codes + second * input_tiles * (32 * S) + words, eviction_policy="evict_first"),
        tl.load(absmax + scales, mask=exists, other=0),
        tl.load(absmax + second * absmax_stride * 8 + scales, mask=exists, other=0),
        tl.load(x + slot // top_k * K + k, mask=slot >= 0, other=0.0),
    )


@triton.jit
def _operand(value, BM: tl.constexpr, S: tl.constexpr):
    """x [S / 2, BM / 8, WARPS, 8, 32] as operand B [WARPS, 16 S, BM], its inputs in the order of `_partial`."""
    WARPS: tl.constexpr = value.shape[2]
    value = tl.reshape(value, [S // 2, BM // 8, WARPS, 8, 4, 2, 2, 2])  # s_hi n_hi w n_lo t s_lo h p
    value = tl.permute(value, [2, 0, 5, 4, 6, 7, 1, 3])  # w | s_hi s_lo t h p | n_hi n_lo
    return tl.reshape(value, [WARPS, 16 * S, BM])


@triton.jit
def _partial(word, pair, x, table, registers, S: tl.constexpr, SHARED: tl.constexpr, ASM: tl.constexpr):
    """One tile per warp times x, scaled: float32 [WARPS, 16, BM]."""
    WARPS: tl.constexpr = word.shape[0]
    if SHARED:  # noqa: SIM108
        weight = lookup(word, table, registers, x.dtype, ASM)
    else:
        weight = decode(word, table, registers, x.dtype, ASM)
    weight = tl.permute(tl.reshape(weight, [WARPS, 8, 4, S, 2, 2, 2]), [0, 5, 1, 3, 2, 6, 4])  # g t s p r h -> r g s t h p
    low, high = halves(pair)
    scale = tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [WARPS, 16, 1]).to(tl.float32)
    return tl.dot(tl.reshape(weight, [WARPS, 16, 16 * S]), x) * scale


@triton.jit
def product(
    x, codes, absmax, bias, table, inverse_factor, out,
    slots, experts, padded_count, slot_weights, count, top_k,
    K, N, row_tiles, input_tiles, absmax_stride,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BM: tl.constexpr, PER_ABSMAX: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr,
    GATED: tl.constexpr, EXPERTS: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr, PAIR: tl.constexpr,
    SHARED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Three products in one, which differ by a few lines before and after the loop.

    Plain:             out[row] = w @ x[row] + bias
    EXPERTS:           out[slot] = (w[expert] @ x[slot // top_k] + bias[expert]) * slot_weights[slot]
    EXPERTS and GATED: out[slot] = clamped SwiGLU of (w[expert] @ x[slot // top_k] + bias[expert])

    Args:
        x: [rows, K] float16 or bfloat16. out: [rows or slots, N] in its own dtype.
        codes, absmax: int32 [E, row_tiles, input_tiles, 32, S], float16 [E, row_tiles, absmax_stride, 16]. If GATED, tiles
            of gate and of up rows in turn.
        bias: [E, row_tiles * 16], in the same order of rows.
        slots, experts, padded_count: as in `launch.Routing`, for blocks of BM; if not SORTED, `experts` has one (local)
            expert a slot. Expert -1 is another rank's: its slots get zeros, or are left alone if GATED.
        count: rows, or slots.
        PAIR: two row tiles a program, which share x; else one.
        SHARED: decode by the table in shared memory.
    """
    tile = tl.program_id(0) * (2 if PAIR else 1)
    first = tl.program_id(1)
    if SORTED and first * BM >= tl.load(padded_count):
        return
    expert = tl.zeros([], tl.int64)
    if EXPERTS:
        expert = tl.load(experts + first).to(tl.int64)
    m = tl.arange(0, BM)
    if not EXPERTS:
        slot = first * BM + m
    elif SORTED:
        slot = tl.load(slots + first * BM + m)
    else:
        slot = tl.where(m == 0, first, count)
    slot = tl.where(slot < count, slot, -1)
    n = tl.arange(0, 16) + (tile // 2 if GATED else tile) * 16
    outputs = out + slot.to(tl.int64)[None, :] * N + n[:, None]
    out_ok = (slot >= 0)[None, :] & (n < N)[:, None]
    out_ok2 = (slot >= 0)[None, :] & (n + 16 < N)[:, None]
    if expert < 0:
        if not GATED:
            zeros = tl.zeros([16, BM], out.dtype.element_ty)
            tl.store(outputs, zeros, mask=out_ok)
            if PAIR:
                tl.store(outputs + 16, zeros, mask=out_ok2)
        return
    second = (tile + 1 < row_tiles).to(tl.int32)  # else the first tile again, and nothing of it is stored
    place = expert * row_tiles + tile
    codes += place * input_tiles * (32 * S)
    absmax = absmax.to(tl.pointer_type(tl.int32)) + place * absmax_stride * 8
    warp = tl.arange(0, WARPS)
    w1, w2, s1, s2, xs = _load(
        x, slot, top_k, K, codes, absmax, second, warp, input_tiles, absmax_stride, PER_ABSMAX, S, BM
    )
    if SHARED:  # noqa: SIM108
        registers = fill_shared(table, ASM)
    else:
        registers = load_table(table)
    value1 = tl.zeros([WARPS, 16, BM], tl.float32)
    value2 = tl.zeros([WARPS, 16, BM], tl.float32)
    for start in tl.range(0, input_tiles, WARPS, num_stages=1):
        xb = _operand(xs, BM, S)
        c1, c2, a1, a2 = w1, w2, s1, s2
        w1, w2, s1, s2, xs = _load(
            x, slot, top_k, K, codes, absmax, second, start + WARPS + warp, input_tiles, absmax_stride, PER_ABSMAX, S, BM
        )
        value1 += _partial(c1, a1, xb, table, registers, S, SHARED, ASM)
        if PAIR:
            value2 += _partial(c2, a2, xb, table, registers, S, SHARED, ASM)
    value1 = tl.sum(value1, axis=0) * inverse_factor
    value2 = tl.sum(value2, axis=0) * inverse_factor
    if HAS_BIAS:
        biases = bias + place * 16 + tl.arange(0, 16)
        value1 += tl.load(biases).to(tl.float32)[:, None]
        if PAIR:
            value2 += tl.load(biases + second * 16).to(tl.float32)[:, None]
    if GATED:
        value1 = clamped_swiglu(value1, value2, ALPHA, LIMIT)
    elif EXPERTS:
        weights = tl.load(slot_weights + slot, mask=slot >= 0, other=0.0)[None, :]
        value1 *= weights
        value2 *= weights
    tl.store(outputs, value1.to(out.dtype.element_ty), mask=out_ok)
    if PAIR and not GATED:
        tl.store(outputs + 16, value2.to(out.dtype.element_ty), mask=out_ok2)

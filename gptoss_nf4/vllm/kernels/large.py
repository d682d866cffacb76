"""Products with many activation rows per weight: prefill.

Each program takes 64 rows of outputs (64 of gate and 64 of up) and `BM` activation rows. Weights are decoded in
registers, as in `small`, multiplied by absmax there, and used from there as operand A; dequantizing whole experts to
memory first would write and read four times the bytes. On Hopper the products are `wgmma`, on Ampere `mma.sync`.
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.codebook import decode, decode_scaled, halves, load_table
from gptoss_nf4.vllm.kernels.swiglu import clamped_swiglu

ROW_TILES = tl.constexpr(4)  # 16-row tiles of a program, one for each warp


@triton.jit
def _weights(
    codes, absmax, tile, tile_ok, block, input_tiles, absmax_stride, table, registers, dtype: tl.constexpr,
    TILE_STRIDE: tl.constexpr, PER_ABSMAX: tl.constexpr, S: tl.constexpr, SCALE_ASM: tl.constexpr, WGMMA: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Tiles `tile` [4] of rows, input tile `block`: weights [64, 16 S] in `dtype`, times the codebook's factor.

    SCALE_ASM multiplies by absmax within the decoding (fewer instructions), else after it (fewer registers).
    """
    place = (tile * TILE_STRIDE)[:, None, None]
    word = tl.load(
        codes + (place * input_tiles + block) * (32 * S)
        + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :],
        mask=tile_ok[:, None, None], other=0,
    )  # fmt: skip
    # Two neighbours in one load: Triton copies no fewer than four bytes ahead of their use.
    pairs = absmax.to(tl.pointer_type(tl.int32)) + (place * absmax_stride + block // PER_ABSMAX) * 8
    if SCALE_ASM and ASM:
        scale0, scale1 = halves(
            tl.load(pairs + (tl.arange(0, 32) // 4)[None, :, None], mask=tile_ok[:, None, None], other=0)
        )
        weight = decode_scaled(word, scale0, scale1, registers, dtype)
        weight = tl.reshape(weight, [ROW_TILES, 8, 4, S, 2, 2, 2])  # g t s p r h
    else:
        scale0, scale1 = halves(tl.load(pairs + tl.arange(0, 8)[None, :, None], mask=tile_ok[:, None, None], other=0))
        weight = tl.reshape(decode(word, table, registers, dtype, ASM), [ROW_TILES, 8, 4, S, 2, 2, 2])
        weight = weight * tl.reshape(tl.join(scale0, scale1).to(dtype), [ROW_TILES, 8, 1, 1, 1, 2, 1])
    # wgmma's operand A in registers has the inputs in order (s h t p); mma.sync's as in `small` (s t h p).
    weight = tl.permute(weight, [0, 5, 1, 3, 6, 2, 4] if WGMMA else [0, 5, 1, 3, 2, 6, 4])
    return tl.reshape(weight, [ROW_TILES * 16, 16 * S])


@triton.jit
def _activations(x, rows, row_ok, block, K, BM: tl.constexpr, S: tl.constexpr, WGMMA: tl.constexpr):
    """x[rows, input tile `block`] as [16 S, BM], in the order of `_weights`."""
    k = block * (16 * S) + tl.arange(0, 16 * S)
    value = tl.load(x + rows[:, None] * K + k[None, :], mask=row_ok[:, None], other=0.0)
    if not WGMMA:
        value = tl.permute(tl.reshape(value, [BM, S, 2, 4, 2]), [0, 1, 3, 2, 4])
        value = tl.reshape(value, [BM, 16 * S])
    return tl.trans(value)


@triton.jit
def swiglu_experts(
    x, codes, absmax, bias, table, inverse_factor, out,
    slots, experts, padded_count, count, top_k,
    K, N, row_tiles, input_tiles, absmax_stride,
    PER_ABSMAX: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, WGMMA: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The same product as `small.product`, GATED, for sorted slots; x and out in `tiles.operand_order`."""
    first = tl.program_id(1)
    if first * BM >= tl.load(padded_count):
        return
    expert = tl.load(experts + first).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slots + first * BM + tl.arange(0, BM))
    slot_ok = slot < count
    rows = (slot // top_k).to(tl.int64)
    tile = tl.program_id(0) * ROW_TILES + tl.arange(0, ROW_TILES)
    tile_ok = tile < row_tiles
    registers = load_table(table)
    codes += expert * row_tiles * 2 * input_tiles * (32 * S)
    absmax += expert * row_tiles * 2 * absmax_stride * 16
    dtype: tl.constexpr = x.dtype.element_ty
    gate = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    up = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    for block in tl.range(0, input_tiles, num_stages=STAGES):
        xb = _activations(x, rows, slot_ok, block, K, BM, S, WGMMA)
        wg = _weights(
            codes, absmax, tile, tile_ok, block, input_tiles, absmax_stride, table, registers, dtype,
            2, PER_ABSMAX, S, BM < 128, WGMMA, ASM,
        )  # fmt: skip
        gate = tl.dot(wg, xb, gate)
        wu = _weights(
            codes + input_tiles * (32 * S), absmax + absmax_stride * 16, tile, tile_ok, block, input_tiles, absmax_stride,
            table, registers, dtype, 2, PER_ABSMAX, S, BM < 128, WGMMA, ASM,
        )  # fmt: skip
        up = tl.dot(wu, xb, up)
    n = tl.program_id(0) * (ROW_TILES * 16) + tl.arange(0, ROW_TILES * 16)
    n_ok = n < row_tiles * 16
    biases = bias + expert * row_tiles * 32 + (n // 16) * 32 + n % 16
    g = gate * inverse_factor + tl.load(biases, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    u = up * inverse_factor + tl.load(biases + 16, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    value = clamped_swiglu(g, u, ALPHA, LIMIT).to(out.dtype.element_ty)
    # Into the order that the second product wants (`tiles.operand_order`): s / 2, t, s % 2, h, p -> s, h, t, p.
    value = tl.permute(tl.reshape(value, [ROW_TILES // 2, 4, 2, 2, 2, BM]), [0, 2, 3, 1, 4, 5])
    value = tl.reshape(value, [ROW_TILES * 16, BM])
    tl.store(out + slot.to(tl.int64)[:, None] * N + n[None, :], tl.trans(value), mask=slot_ok[:, None] & (n < N)[None, :])


@triton.jit
def down_experts(
    x, codes, absmax, bias, table, inverse_factor, out,
    slots, experts, padded_count, count, slot_weights,
    K, N, row_tiles, input_tiles, absmax_stride,
    PER_ABSMAX: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, WGMMA: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The same product as `small.product` with EXPERTS for sorted slots; x in `tiles.operand_order`."""
    first = tl.program_id(1)
    n = tl.program_id(0) * (ROW_TILES * 16) + tl.arange(0, ROW_TILES * 16)
    if first * BM >= tl.load(padded_count):
        return
    expert = tl.load(experts + first).to(tl.int64)
    slot = tl.load(slots + first * BM + tl.arange(0, BM))
    slot_ok = slot < count
    rows = slot.to(tl.int64)
    outputs = out + rows[:, None] * N + n[None, :]
    out_ok = slot_ok[:, None] & (n < N)[None, :]
    if expert < 0:
        tl.store(outputs, tl.zeros([BM, ROW_TILES * 16], out.dtype.element_ty), mask=out_ok)
        return
    tile = tl.program_id(0) * ROW_TILES + tl.arange(0, ROW_TILES)
    tile_ok = tile < row_tiles
    registers = load_table(table)
    codes += expert * row_tiles * input_tiles * (32 * S)
    absmax += expert * row_tiles * absmax_stride * 16
    sums = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    for block in tl.range(0, input_tiles, num_stages=STAGES):
        xb = _activations(x, rows, slot_ok, block, K, BM, S, WGMMA)
        weight = _weights(
            codes, absmax, tile, tile_ok, block, input_tiles, absmax_stride, table, registers, x.dtype.element_ty,
            1, PER_ABSMAX, S, True, WGMMA, ASM,
        )  # fmt: skip
        sums = tl.dot(weight, xb, sums)
    biases = tl.load(bias + expert * row_tiles * 16 + n, mask=n < row_tiles * 16, other=0.0)
    value = sums * inverse_factor + biases.to(tl.float32)[:, None]
    value *= tl.load(slot_weights + rows, mask=slot_ok, other=0.0)[None, :]
    tl.store(outputs, tl.trans(value.to(out.dtype.element_ty)), mask=out_ok)

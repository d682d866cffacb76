"""Products with many rows of activations for each expert: prefill.

A program computes 64 rows of outputs, or 64 of gate and 64 of up, for `BM` rows of activations. Weights are
decoded in registers, multiplied by absmax there, and go from there into the product as operand A. To dequantize
whole experts to memory instead would mean to write and read four times the bytes. On Hopper the products are
`wgmma`, on Ampere `mma.sync`.

The kernels are `swiglu_experts` and `down_experts`. They take the arguments of their namesakes in `small`, but
activations in the order of `tiles.operand_order`, and sorted slots only. What adapters add comes after the loop.

Names end in the letters of their axes, see `tiles`. Here R is the four row tiles of a program, and n its 64 rows, (R r g).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.decode import (
    COMPILED,
    decode,
    decode_scaled,
    decode_times,
    fill_shared,
    halves,
    load_table,
    lookup_scaled,
)
from gptoss_nf4.vllm.kernels.lora import add_delta
from gptoss_nf4.vllm.kernels.swiglu import clamped_swiglu

WARPS = 4  # of a program
ROW_TILES = tl.constexpr(WARPS)  # whose sums a program holds, of gate and of up each
# Row tiles of a program: gate and up, or neighbours.
SWIGLU_TILES = 2 * WARPS
DOWN_TILES = WARPS


class Tiles(NamedTuple):
    """Pointers to row tiles: codes int32 [R, C, l, s], absmax float16 [R, B, g r].

    Where blocks run along the outputs, absmax is [B, in] of the expert, in the dtype of x.
    """

    codes: tl.tensor
    absmax: tl.tensor


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
    """
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
    gate_tiles, up_tiles = _tiles_from(weight, expert, first), _tiles_from(weight, expert, first + 1)
    gate_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    up_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    for C in tl.range(0, weight.C, num_stages=STAGES):
        x_km = _activations(x, row_m, used_m, C, K, weight.S, WGMMA)
        gate_nk = _weights(
            gate_tiles, 2 * pair_R, exists_R, C, weight, decoder, dtype, BM < 128 or SHARED_TABLE, WGMMA, SHARED_TABLE
        )
        gate_nm = tl.dot(gate_nk, x_km, gate_nm)
        up_nk = _weights(
            up_tiles, 2 * pair_R, exists_R, C, weight, decoder, dtype, BM < 128 or SHARED_TABLE, WGMMA, SHARED_TABLE
        )
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
):
    """out[slot] = (w[expert] @ x[slot] + bias[expert]) * slot_weights[slot].

    A program takes four row tiles; the grid is row tiles / 4, blocks of slots. Slots of another rank's experts get zeros.

    Args:
        x: [count, K] float16 or bfloat16, in `tiles.operand_order`. out: [count, N] in its own dtype.
        weight: a `Weight`. lora: a `lora.Lora` or None. routing: a `Routing` for blocks of BM, with slots.
        slot_weights: float32 [count].
        count: the number of slots.
        STAGES, WGMMA, SHARED_TABLE: as in `swiglu_experts`.
    """
    block = tl.program_id(1)
    n = tl.program_id(0) * (ROW_TILES * 16) + tl.arange(0, ROW_TILES * 16)
    if block * BM >= tl.load(routing.padded_count):
        return
    expert = tl.load(routing.experts + block).to(tl.int64)
    slot_m = tl.load(routing.slots + block * BM + tl.arange(0, BM))
    used_m = slot_m < count
    row_m = slot_m.to(tl.int64)
    out_mn = out + row_m[:, None] * N + n[None, :]
    stored_mn = used_m[:, None] & (n < N)[None, :]
    if expert < 0:
        tl.store(out_mn, tl.zeros([BM, ROW_TILES * 16], out.dtype.element_ty), mask=stored_mn)
        return
    tile_R = tl.program_id(0) * ROW_TILES + tl.arange(0, ROW_TILES)
    exists_R = tile_R < weight.R
    first = expert * weight.R
    dtype: tl.constexpr = x.dtype.element_ty
    decoder = fill_shared(weight.table) if SHARED_TABLE else load_table(weight.table)
    tiles = _tiles_from(weight, expert, first)
    sum_nm = tl.zeros([ROW_TILES * 16, BM], tl.float32)
    for C in tl.range(0, weight.C, num_stages=STAGES):
        x_km = _activations(x, row_m, used_m, C, K, weight.S, WGMMA)
        weight_nk = _weights(tiles, tile_R, exists_R, C, weight, decoder, dtype, True, WGMMA, SHARED_TABLE)
        sum_nm = tl.dot(weight_nk, x_km, sum_nm)
    bias_n = tl.load(weight.bias + first * 16 + n, mask=n < weight.R * 16, other=0.0).to(tl.float32)
    value_nm = sum_nm * weight.unscale + bias_n[:, None]
    if lora is not None:
        delta_nm = add_delta(tl.zeros_like(sum_nm), lora, expert, n, 0, slot_m, used_m)
        value_nm += delta_nm * lora.scale
    value_nm *= tl.load(slot_weights + row_m, mask=used_m, other=0.0)[None, :]
    tl.store(out_mn, tl.trans(value_nm.to(out.dtype.element_ty)), mask=stored_mn)


@triton.jit
def _tiles_from(weight, expert, first):
    """All row tiles of `expert` from number `first` on, counted over all experts."""
    codes = weight.codes + first * weight.C * (32 * weight.S)
    if weight.ROW_TILES_PER_BLOCK:
        absmax = weight.absmax + expert * weight.B * (weight.C * (16 * weight.S))
    else:
        absmax = weight.absmax + first * weight.B * 16
    return Tiles(codes, absmax)


@triton.jit
def _weights(
    tiles,
    tile_R,
    exists_R,
    C,
    weight,
    decoder,
    dtype: tl.constexpr,
    SCALE_IN_DECODING: tl.constexpr,
    WGMMA: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
):
    """Operand A: row tiles `tile_R` of input tile C, times absmax and the codebook's factor, `dtype` [n, k].

    decoder: what `fill_shared` (if SHARED_TABLE) or `load_table` gave.
    SCALE_IN_DECODING multiplies by absmax within the decoding (fewer instructions), else after it (fewer registers).
    """
    S: tl.constexpr = weight.S
    tile_Rls = tile_R[:, None, None]
    exists_Rls = exists_R[:, None, None]
    place_Rls = (tile_Rls * weight.C + C) * (32 * S) + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :]
    words_Rls = tl.load(tiles.codes + place_Rls, mask=exists_Rls, other=0)
    if weight.ROW_TILES_PER_BLOCK:
        weight_Rgtsprh = _times_inputs(words_Rls, tiles, tile_R, exists_R, C, weight, decoder, dtype, SHARED_TABLE)
    else:
        weight_Rgtsprh = _times_rows(
            words_Rls, tiles, tile_R, exists_R, C, weight, decoder, dtype, SCALE_IN_DECODING, SHARED_TABLE
        )
    # k in the order in which the weights stand in a lane's registers already, as Triton lays out operand A:
    # (s h t p) for wgmma, (s t h p) for mma.sync.
    if WGMMA:
        weight_Rrgk = tl.permute(weight_Rgtsprh, [0, 5, 1, 3, 6, 2, 4])
    else:
        weight_Rrgk = tl.permute(weight_Rgtsprh, [0, 5, 1, 3, 2, 6, 4])
    return tl.reshape(weight_Rrgk, [ROW_TILES * 16, 16 * S])


@triton.jit
def _times_rows(
    words_Rls,
    tiles,
    tile_R,
    exists_R,
    C,
    weight,
    decoder,
    dtype: tl.constexpr,
    SCALE_IN_DECODING: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
):
    """The weights of `words_Rls`, times absmax of their rows: [R, g, t, s, p, r, h]."""
    S: tl.constexpr = weight.S
    tile_Rls = tile_R[:, None, None]
    exists_Rls = exists_R[:, None, None]
    # Pairs of absmax: Triton copies no fewer than four bytes ahead of their use.
    pairs_R = tiles.absmax.to(tl.pointer_type(tl.int32)) + (tile_Rls * weight.B + C // weight.TILES_PER_BLOCK) * 8
    if SCALE_IN_DECODING and COMPILED:
        pairs_Rl = pairs_R + (tl.arange(0, 32) // 4)[None, :, None]  # g of lane 4g + t
        absmax0_Rl, absmax1_Rl = halves(tl.load(pairs_Rl, mask=exists_Rls, other=0))
        if SHARED_TABLE:
            weight_Rlsprh = lookup_scaled(words_Rls, absmax0_Rl, absmax1_Rl, decoder, dtype)
        else:
            weight_Rlsprh = decode_scaled(words_Rls, absmax0_Rl, absmax1_Rl, decoder, dtype)
        weight_Rgtsprh = tl.reshape(weight_Rlsprh, [ROW_TILES, 8, 4, S, 2, 2, 2])
    else:
        pairs_Rg = pairs_R + tl.arange(0, 8)[None, :, None]
        absmax0_Rg, absmax1_Rg = halves(tl.load(pairs_Rg, mask=exists_Rls, other=0))
        absmax_Rgr = tl.join(absmax0_Rg, absmax1_Rg).to(dtype)
        weight_Rgtsprh = tl.reshape(decode(words_Rls, decoder, dtype), [ROW_TILES, 8, 4, S, 2, 2, 2])
        weight_Rgtsprh = weight_Rgtsprh * tl.reshape(absmax_Rgr, [ROW_TILES, 8, 1, 1, 1, 2, 1])
    return weight_Rgtsprh


@triton.jit
def _times_inputs(words_Rls, tiles, tile_R, exists_R, C, weight, decoder, dtype: tl.constexpr, SHARED_TABLE: tl.constexpr):
    """The same where blocks run along the outputs, times absmax of their inputs."""
    S: tl.constexpr = weight.S
    group_Rtqj = (tile_R // weight.ROW_TILES_PER_BLOCK)[:, None, None, None]
    # Pairs (p), j counts those of four inputs (e h). In memory the inputs of a tile are (q t e h p).
    pair_tqj = (
        tl.arange(0, S // 2)[None, :, None] * 16 + tl.arange(0, 4)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    )
    pairs_Rtqj = tl.load(
        tiles.absmax.to(tl.pointer_type(tl.int32)) + (group_Rtqj * weight.C + C) * (8 * S) + pair_tqj[None, :, :, :],
        mask=exists_R[:, None, None, None],
        other=0,
    )
    pairs_Rgtsh = tl.broadcast_to(tl.reshape(pairs_Rtqj, [ROW_TILES, 1, 4, S, 2]), [ROW_TILES, 8, 4, S, 2])
    absmax0_Rls, absmax1_Rls = tl.split(tl.reshape(pairs_Rgtsh, [ROW_TILES, 32, S, 2]))
    weight_Rlsprh = decode_times(words_Rls, absmax0_Rls, absmax1_Rls, decoder, dtype, SHARED_TABLE)
    return tl.reshape(weight_Rlsprh, [ROW_TILES, 8, 4, S, 2, 2, 2])


@triton.jit
def _activations(x, row_m, used_m, C, K, S: tl.constexpr, WGMMA: tl.constexpr):
    """Operand B: x[row_m] of input tile C, [k, m] in the same order of k; zeros where not `used_m`."""
    BM: tl.constexpr = row_m.shape[0]
    k = C * (16 * S) + tl.arange(0, 16 * S)
    x_mk = tl.load(x + row_m[:, None] * K + k[None, :], mask=used_m[:, None], other=0.0)
    if not WGMMA:
        x_mshtp = tl.reshape(x_mk, [BM, S, 2, 4, 2])
        x_msthp = tl.permute(x_mshtp, [0, 1, 3, 2, 4])
        x_mk = tl.reshape(x_msthp, [BM, 16 * S])
    return tl.trans(x_mk)

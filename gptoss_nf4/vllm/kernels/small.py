"""Products with few rows of activations: decoding of a batch, one token and up.

A program computes one or two tiles of 16 output rows, for up to `BM` rows of activations. Its warps share the
inputs: warp w takes the input tiles w, w + WARPS, and so on. It multiplies them on tensor cores with the weight
as operand A, so that the instruction's 16 rows are weights, and only its 8 columns need padding. Both operands
go from memory straight to the registers of the lane that holds them, one tile ahead of their use. The loop has
no barrier, and touches shared memory for the codebook's table at most. The 16 x 8 sums of a tile are multiplied
by absmax in float32, once per 64 inputs. At the end the warps' sums are added up in shared memory.

The kernels are `linear`, `swiglu_experts` and `down_experts`. They share the loop, `_products`, and differ before
and after it. What adapters add is computed within `_products`, see `lora`.

Names end in the letters of their axes, see `tiles`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.decode import decode, fill_shared, halves, load_table, lookup
from gptoss_nf4.vllm.kernels.lora import adapters_of, delta, slice_of, some_of_b, wait_for_t
from gptoss_nf4.vllm.kernels.swiglu import clamped_swiglu

# Row tiles of a program: a gate and an up tile, or two neighbours.
SWIGLU_TILES = 2
DOWN_TILES = 2


class Rows(NamedTuple):
    """A program's rows of activations, of length K: x[slot // top_k]. Slot -1 stands for a row of zeros."""

    x: tl.tensor
    slot_m: tl.tensor
    top_k: tl.tensor
    K: tl.tensor


class Tiles(NamedTuple):
    """Pointers to a program's two row tiles: codes int32 [C, l, s], and absmax int32 [B, g], pairs of float16."""

    codes: tl.tensor
    next_codes: tl.tensor
    absmax: tl.tensor
    next_absmax: tl.tensor


@triton.jit(do_not_specialize=["count"])
def linear(x, weight, lora, out, count, K, N, BM: tl.constexpr, WARPS: tl.constexpr, SHARED_TABLE: tl.constexpr):
    """out[row] = w @ x[row] + bias.

    A program takes one row tile; the grid is row tiles, blocks of BM rows of x.

    Args:
        x: [count, K] float16 or bfloat16. out: [count, N] in its own dtype.
        weight: a `Weight` of one expert. lora: a `lora.Lora` or None.
        SHARED_TABLE: decode by `lookup`, else by `decode`.
    """
    tile = tl.program_id(0)
    row_m = tl.program_id(1) * BM + tl.arange(0, BM)
    row_m = tl.where(row_m < count, row_m, -1)
    sum_nm, _ = _products(Rows(x, row_m, 1, K), weight, lora, 0, tile, WARPS, SHARED_TABLE, False, False)
    _store(out, sum_nm, row_m, tile, N)


@triton.jit(do_not_specialize=["count"])
def swiglu_experts(
    x, weight, lora, out, routing, count, top_k, K, N, BM: tl.constexpr, WARPS: tl.constexpr, SHARED_TABLE: tl.constexpr
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
    if routing.slots is not None and block * BM >= tl.load(routing.padded_count):
        return
    expert = tl.load(routing.experts + block).to(tl.int64)
    if expert < 0:
        wait_for_t(lora)
        return
    slot_m = _slots(routing, block, count, BM)
    rows = Rows(x, slot_m, top_k, K)
    gate_nm, up_nm = _products(rows, weight, lora, expert, 2 * pair, WARPS, SHARED_TABLE, True, True)
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
):
    """out[slot] = (w[expert] @ x[slot] + bias[expert]) * slot_weights[slot].

    A program takes two row tiles; the grid is row tiles / 2, blocks of slots. Slots of another rank's experts get zeros.

    Args:
        x: [count, K] float16 or bfloat16. out: [count, N] in its own dtype.
        weight: a `Weight`. lora: a `lora.Lora` or None. routing: a `Routing` for blocks of BM.
        slot_weights: float32 [count].
        count: the number of slots.
    """
    tile, block = 2 * tl.program_id(0), tl.program_id(1)
    if routing.slots is not None and block * BM >= tl.load(routing.padded_count):
        return
    expert = tl.load(routing.experts + block).to(tl.int64)
    slot_m = _slots(routing, block, count, BM)
    if expert < 0:
        wait_for_t(lora)
        zeros_nm = tl.zeros([16, BM], tl.float32)
        _store(out, zeros_nm, slot_m, tile, N)
        _store(out, zeros_nm, slot_m, tile + 1, N)
        return
    rows = Rows(x, slot_m, 1, K)
    first_nm, second_nm = _products(rows, weight, lora, expert, tile, WARPS, SHARED_TABLE, True, False)
    weight_m = tl.load(slot_weights + slot_m, mask=slot_m >= 0, other=0.0)
    _store(out, first_nm * weight_m[None, :], slot_m, tile, N)
    _store(out, second_nm * weight_m[None, :], slot_m, tile + 1, N)


@triton.jit
def _slots(routing, block, count, BM: tl.constexpr):
    """The slots of a block, int32 [m]; -1 where there is none."""
    m = tl.arange(0, BM)
    slot_m = tl.load(routing.slots + block * BM + m) if routing.slots is not None else tl.where(m == 0, block, count)
    return tl.where(slot_m < count, slot_m, -1)


@triton.jit
def _products(
    rows,
    weight,
    lora,
    expert,
    tile,
    WARPS: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    TWO: tl.constexpr,
    GATE_AND_UP: tl.constexpr,
):
    """w[expert] @ x[slot // top_k] + bias, plus what adapters add: float32 [n, m].

    The first result is that of row tile `tile`, and if TWO, the second one that of the next tile. Where there is no next
    one, it is that of the same tile again, not to be stored. GATE_AND_UP: the two tiles are one of gate and one of up
    rows, which are interleaved in lora_B.
    """
    BM: tl.constexpr = rows.slot_m.shape[0]
    to_next = (tile + 1 < weight.R).to(tl.int32)
    first_row = tile * 16
    tile = expert * weight.R + tile.to(tl.int64)
    codes = weight.codes + tile * weight.C * (32 * weight.S)
    absmax = weight.absmax.to(tl.pointer_type(tl.int32)) + tile * weight.B * 8
    tiles = Tiles(codes, codes + to_next * weight.C * (32 * weight.S), absmax, absmax + to_next * weight.B * 8)
    warp = tl.arange(0, WARPS)
    ahead = _load(rows, tiles, weight, warp)
    if lora is not None:
        adapter_m = adapters_of(lora, rows.slot_m)
    decoder = fill_shared(weight.table) if SHARED_TABLE else load_table(weight.table)
    first_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    second_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    for start in tl.range(0, weight.C, WARPS, num_stages=1):
        words1_wls, words2_wls, absmax1_wg, absmax2_wg, x_qMwmk = ahead
        x_wkm = _operand(x_qMwmk)
        ahead = _load(rows, tiles, weight, start + WARPS + warp)
        first_wnm += _product(words1_wls, absmax1_wg, x_wkm, decoder, SHARED_TABLE)
        if TWO:
            second_wnm += _product(words2_wls, absmax2_wg, x_wkm, decoder, SHARED_TABLE)
    if lora is not None:  # lora_B comes while the warps' sums are added up
        first_row_n = first_row + tl.arange(0, 16) * (2 if GATE_AND_UP else 1)
        second_row_n = first_row_n + (1 if GATE_AND_UP else 16)
        first_b_nmj = some_of_b(lora, expert, first_row_n, adapter_m, 0)
        if TWO:
            second_b_nmj = some_of_b(lora, expert, second_row_n, adapter_m, 0)
    first_nm = tl.sum(first_wnm, axis=0) * weight.unscale
    second_nm = tl.sum(second_wnm, axis=0) * weight.unscale
    if weight.bias is not None:
        bias = weight.bias + tile * 16 + tl.arange(0, 16)
        first_nm += tl.load(bias).to(tl.float32)[:, None]
        if TWO:
            second_nm += tl.load(bias + to_next * 16).to(tl.float32)[:, None]
    if lora is not None:
        wait_for_t(lora)
        slice = slice_of(lora, first_row)
        first_delta_nm = delta(lora, expert, first_row_n, slice, rows.slot_m, adapter_m, first_b_nmj)
        if TWO:
            second_nm += delta(lora, expert, second_row_n, slice, rows.slot_m, adapter_m, second_b_nmj)
        first_nm += first_delta_nm
    return first_nm, second_nm


@triton.jit
def _load(rows, tiles, weight, C_w):
    """What the warps need of input tiles `C_w`, five tensors: words [w, l, s] and pairs of absmax [w, g], and x.

    Words and absmax are of both row tiles. x is [q, M, w, m, k], where M counts groups of eight rows and k the 32
    inputs (t e h p) of a half; zeros for slot -1. Beyond the last input tile that one is read again, with absmax 0: one
    minimum instead of masks on all loads.
    """
    S: tl.constexpr = weight.S
    BM: tl.constexpr = rows.slot_m.shape[0]
    exists_w = C_w < weight.C
    C_w = tl.minimum(C_w, weight.C - 1)
    word_wls = C_w[:, None, None] * (32 * S) + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :]
    pair_wg = (C_w // weight.TILES_PER_BLOCK)[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Triton spreads lanes and warps over the last axes first. With q and M in front, a lane gets eight neighbouring
    # inputs of a row, and these are the ones that it has to hold as operand B.
    q = tl.arange(0, S // 2)[:, None, None, None, None]
    k_qMwmk = C_w[None, None, :, None, None] * (16 * S) + q * 32 + tl.arange(0, 32)
    slot_qMwmk = tl.reshape(rows.slot_m, [1, BM // 8, 1, 8, 1])
    # Weights are read once, x by every program: weights should not push x out of the L1 cache.
    return (
        tl.load(tiles.codes + word_wls, eviction_policy="evict_first"),
        tl.load(tiles.next_codes + word_wls, eviction_policy="evict_first"),
        tl.load(tiles.absmax + pair_wg, mask=exists_w[:, None], other=0),
        tl.load(tiles.next_absmax + pair_wg, mask=exists_w[:, None], other=0),
        tl.load(rows.x + slot_qMwmk // rows.top_k * rows.K + k_qMwmk, mask=slot_qMwmk >= 0, other=0.0),
    )


@triton.jit
def _operand(x_qMwmk):
    """x as `_load` brings it, as operand B [w, k, m] with the inputs of a tile in the order (s t h p)."""
    Q: tl.constexpr = x_qMwmk.shape[0]
    M: tl.constexpr = x_qMwmk.shape[1]
    WARPS: tl.constexpr = x_qMwmk.shape[2]
    x_qMwmtehp = tl.reshape(x_qMwmk, [Q, M, WARPS, 8, 4, 2, 2, 2])
    x_wqethpMm = tl.permute(x_qMwmtehp, [2, 0, 5, 4, 6, 7, 1, 3])
    return tl.reshape(x_wqethpMm, [WARPS, 32 * Q, 8 * M])


@triton.jit
def _product(words_wls, absmax_wg, x_wkm, decoder, SHARED_TABLE: tl.constexpr):
    """Each warp's tile times its x, times absmax: float32 [w, n, m]."""
    WARPS: tl.constexpr = words_wls.shape[0]
    S: tl.constexpr = words_wls.shape[2]
    dtype: tl.constexpr = x_wkm.dtype
    weight_wlsprh = lookup(words_wls, decoder, dtype) if SHARED_TABLE else decode(words_wls, decoder, dtype)
    weight_wgtsprh = tl.reshape(weight_wlsprh, [WARPS, 8, 4, S, 2, 2, 2])
    weight_wrgsthp = tl.permute(weight_wgtsprh, [0, 5, 1, 3, 2, 6, 4])
    weight_wnk = tl.reshape(weight_wrgsthp, [WARPS, 16, 16 * S])
    absmax0_wg, absmax1_wg = halves(absmax_wg)
    absmax_wrg = tl.permute(tl.join(absmax0_wg, absmax1_wg), [0, 2, 1])
    absmax_wnm = tl.reshape(absmax_wrg, [WARPS, 16, 1]).to(tl.float32)
    return tl.dot(weight_wnk, x_wkm) * absmax_wnm


@triton.jit
def _store(out, value_nm, slot_m, tile, N):
    """float32 [n, m] to out[slot, row of tile]."""
    n = tile * 16 + tl.arange(0, 16)
    valid_nm = (slot_m >= 0)[None, :] & (n < N)[:, None]
    tl.store(out + slot_m.to(tl.int64)[None, :] * N + n[:, None], value_nm.to(out.dtype.element_ty), mask=valid_nm)

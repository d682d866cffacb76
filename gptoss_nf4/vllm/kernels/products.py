"""The loop of the decoding kernels: row tiles of a packed weight times a few rows of activations.

A program multiplies one or two tiles of 16 output rows. Its warps share the inputs: warp w takes the input tiles w, w +
WARPS, and so on. It multiplies them on tensor cores with the weight as operand A, so that the instruction's 16 rows are
weights, and only its 8 columns need padding. Both operands go from memory straight to the registers of the lane that
holds them, one tile ahead of their use. The loop has no barrier, and touches shared memory for the codebook's table at
most. Where blocks run along the inputs, the 16 x 8 sums of a tile are multiplied by absmax in float32, once per 64 inputs.
Where they run along the outputs, x is, in its own dtype, once for both row tiles. At the end the warps' sums are added up
in shared memory.

Names end in the letters of their axes, see `tiles`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import prefetch, start_early
from gptoss_nf4.vllm.kernels.decode import decode, halves, lookup, times
from gptoss_nf4.vllm.kernels.lora import adapters_of, delta, slice_of, some_of_b, wait_for_t


class Rows(NamedTuple):
    """A program's rows of activations, of length K: x[slot // top_k]. Slot -1 stands for a row of zeros."""

    x: tl.tensor
    slot_m: tl.tensor
    top_k: tl.tensor
    K: tl.tensor


class Tiles(NamedTuple):
    """Pointers to a program's two row tiles: codes int32 [C, l, s], and absmax.

    absmax: int32 [B, g], pairs of float16; where blocks run along the outputs, one for each input in the dtype of x.
    """

    codes: tl.tensor
    next_codes: tl.tensor
    absmax: tl.tensor
    next_absmax: tl.tensor


@triton.jit
def products(
    rows,
    weight,
    lora,
    expert,
    tile,
    decoder,
    WARPS: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
    TWO: tl.constexpr,
    GATE_AND_UP: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """w[expert] @ x[slot // top_k] + bias, plus what adapters add: float32 [n, m].

    The first result is that of row tile `tile`, and if TWO, the second one that of the next tile. Where there is no next
    one, it is that of the same tile again, not to be stored. GATE_AND_UP: the two tiles are one of gate and one of up
    rows, which are interleaved in lora_B.
    """
    BM: tl.constexpr = rows.slot_m.shape[0]
    to_next = (tile + 1 < weight.R).to(tl.int32)
    first_row = tile * 16
    if weight.ROW_TILES_PER_BLOCK:
        block = expert * weight.B + tile // weight.ROW_TILES_PER_BLOCK
    tile = expert * weight.R + tile.to(tl.int64)
    codes = weight.codes + tile * weight.C * (32 * weight.S)
    if weight.ROW_TILES_PER_BLOCK:
        absmax = weight.absmax + block * rows.K
        tiles = Tiles(codes, codes + to_next * weight.C * (32 * weight.S), absmax, absmax)
    else:
        absmax = weight.absmax.to(tl.pointer_type(tl.int32)) + tile * weight.B * 8
        tiles = Tiles(codes, codes + to_next * weight.C * (32 * weight.S), absmax, absmax + to_next * weight.B * 8)
    warp = tl.arange(0, WARPS)
    weights_ahead = _load_weights(tiles, weight, rows, warp)
    start_early(EARLY)
    x_ahead = _load_x(rows, weight, warp)
    if lora is not None:
        adapter_m = adapters_of(lora, rows.slot_m)
    first_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    second_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    if AHEAD:
        _prefetch(tiles, weight, WARPS + warp)
    for start in tl.range(0, weight.C, WARPS, num_stages=1):
        if AHEAD:
            _prefetch(tiles, weight, start + 2 * WARPS + warp)
        words1_wls, words2_wls, absmax1, absmax2 = weights_ahead
        x_wkm = operand(times(x_ahead, absmax1) if weight.ROW_TILES_PER_BLOCK else x_ahead)
        weights_ahead = _load_weights(tiles, weight, rows, start + WARPS + warp)
        x_ahead = _load_x(rows, weight, start + WARPS + warp)
        first_wnm = _add_product(first_wnm, words1_wls, absmax1, x_wkm, weight, decoder, SHARED_TABLE)
        if TWO:
            second_wnm = _add_product(second_wnm, words2_wls, absmax2, x_wkm, weight, decoder, SHARED_TABLE)
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
def _load_weights(tiles, weight, rows, C_w):
    """What the warps need of input tiles `C_w` of both row tiles: words [w, l, s] twice, and absmax twice.

    absmax: pairs [w, g]. Where blocks run along the outputs, that of each input, in the order of `_load_x`; both row tiles
    have the same one, since the first has an even number and a block has 32 rows or more. Beyond the last input tile that
    one is read again, with absmax 0: one minimum instead of masks on all loads.
    """
    S: tl.constexpr = weight.S
    exists_w = C_w < weight.C
    C_w = tl.minimum(C_w, weight.C - 1)
    word_wls = C_w[:, None, None] * (32 * S) + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :]
    if weight.ROW_TILES_PER_BLOCK:
        # Eight times the same, since eight lanes of a warp hold the same inputs of different rows of x. Lanes of rows that
        # are not in use do not ask for it. With few tokens they are most, and the L1 cache is busy with the table.
        place = _inputs(C_w, S) + tl.zeros([1, 1, 1, 8, 1], tl.int32)
    else:
        place = (C_w // weight.TILES_PER_BLOCK)[:, None] * 8 + tl.arange(0, 8)[None, :]
    # Weights are read once, x by every program: weights should not push x out of the L1 cache.
    words1_wls = tl.load(tiles.codes + word_wls, eviction_policy="evict_first")
    words2_wls = tl.load(tiles.next_codes + word_wls, eviction_policy="evict_first")
    if weight.ROW_TILES_PER_BLOCK:
        BM: tl.constexpr = rows.slot_m.shape[0]
        last_slot_m = tl.max(tl.reshape(rows.slot_m, [BM // 8, 8]), axis=0)
        asks = (last_slot_m >= 0)[None, None, None, :, None] & exists_w[None, None, :, None, None]
        absmax1 = tl.load(tiles.absmax + place, mask=asks, other=0.0)
        absmax2 = absmax1
    else:
        absmax1 = tl.load(tiles.absmax + place, mask=exists_w[:, None], other=0)
        absmax2 = tl.load(tiles.next_absmax + place, mask=exists_w[:, None], other=0)
    return words1_wls, words2_wls, absmax1, absmax2


@triton.jit
def _prefetch(tiles, weight, C_w):
    """Ask for the first row tile's input tiles `C_w`: a lane for each line of codes, and one for absmax."""
    S: tl.constexpr = weight.S
    lane = tl.arange(0, 32)[None, :]
    code_wl = tiles.codes.to(tl.int64) + (C_w * (128 * S))[:, None] + lane * 128
    if weight.ROW_TILES_PER_BLOCK:
        absmax_w = tiles.absmax.to(tl.int64) + C_w * (32 * S)
    else:
        absmax_w = tiles.absmax.to(tl.int64) + C_w // weight.TILES_PER_BLOCK * 32
    prefetch(tl.where(lane < S, code_wl, absmax_w[:, None]), (C_w < weight.C)[:, None] & (lane <= S))


@triton.jit
def _load_x(rows, weight, C_w):
    """x of the warps' input tiles `C_w` (the last one beyond it): [q, M, w, m, k], zeros for slot -1.

    M counts groups of eight rows and k the 32 inputs (t e h p) of a half. Of eight rows, where blocks run along the
    outputs, x beyond the last tile is 0 as well as absmax: both loads have one predicate then.
    """
    S: tl.constexpr = weight.S
    BM: tl.constexpr = rows.slot_m.shape[0]
    ONE_PREDICATE: tl.constexpr = BM == 8 and weight.ROW_TILES_PER_BLOCK > 0
    if ONE_PREDICATE:
        exists_w = C_w < weight.C
    C_w = tl.minimum(C_w, weight.C - 1)
    k_qMwmk = _inputs(C_w, S)
    slot_qMwmk = tl.reshape(rows.slot_m, [1, BM // 8, 1, 8, 1])
    used_qMwmk = slot_qMwmk >= 0
    if ONE_PREDICATE:
        used_qMwmk &= exists_w[None, None, :, None, None]
    return tl.load(rows.x + slot_qMwmk // rows.top_k * rows.K + k_qMwmk, mask=used_qMwmk, other=0.0)


@triton.jit
def _inputs(C_w, S: tl.constexpr):
    """The inputs of the warps' input tiles `C_w`, int32 [q, 1, w, 1, k]."""
    # Triton spreads lanes and warps over the last axes first. With q and M in front, a lane gets eight neighbouring
    # inputs of a row, and these are the ones that it has to hold as operand B.
    q = tl.arange(0, S // 2)[:, None, None, None, None]
    return C_w[None, None, :, None, None] * (16 * S) + q * 32 + tl.arange(0, 32)


@triton.jit
def operand(x_qMwmk):
    """x as `_load_x` brings it, as operand B [w, k, m] with the inputs of a tile in the order (s t h p)."""
    Q: tl.constexpr = x_qMwmk.shape[0]
    M: tl.constexpr = x_qMwmk.shape[1]
    WARPS: tl.constexpr = x_qMwmk.shape[2]
    x_qMwmtehp = tl.reshape(x_qMwmk, [Q, M, WARPS, 8, 4, 2, 2, 2])
    x_wqethpMm = tl.permute(x_qMwmtehp, [2, 0, 5, 4, 6, 7, 1, 3])
    return tl.reshape(x_wqethpMm, [WARPS, 32 * Q, 8 * M])


@triton.jit
def _add_product(sum_wnm, words_wls, absmax, x_wkm, weight, decoder, SHARED_TABLE: tl.constexpr):
    """`sum_wnm`, float32 [w, n, m], plus each warp's tile times its x, times absmax where x is not that already."""
    WARPS: tl.constexpr = words_wls.shape[0]
    S: tl.constexpr = words_wls.shape[2]
    dtype: tl.constexpr = x_wkm.dtype
    weight_wlsprh = lookup(words_wls, decoder, dtype) if SHARED_TABLE else decode(words_wls, decoder, dtype)
    weight_wgtsprh = tl.reshape(weight_wlsprh, [WARPS, 8, 4, S, 2, 2, 2])
    weight_wrgsthp = tl.permute(weight_wgtsprh, [0, 5, 1, 3, 2, 6, 4])
    weight_wnk = tl.reshape(weight_wrgsthp, [WARPS, 16, 16 * S])
    if weight.ROW_TILES_PER_BLOCK:
        sum_wnm = tl.dot(weight_wnk, x_wkm, sum_wnm)
    else:
        absmax0_wg, absmax1_wg = halves(absmax)
        absmax_wrg = tl.permute(tl.join(absmax0_wg, absmax1_wg), [0, 2, 1])
        absmax_wnm = tl.reshape(absmax_wrg, [WARPS, 16, 1]).to(tl.float32)
        sum_wnm += tl.dot(weight_wnk, x_wkm) * absmax_wnm
    return sum_wnm

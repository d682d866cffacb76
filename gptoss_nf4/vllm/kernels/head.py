"""Products with a dense weight that is stored in 12 bits, see `twelve_bits`. Made for the head, gpt-oss's largest matrix.

`product` works as `small.linear` does: a program computes one or two tiles of 16 rows of the weight for up to `BM` rows of
activations, its warps share the inputs, weights go from memory to registers to tensor cores, one input tile ahead. What
differs is how a weight is decoded: one permute finds the exponents of four weights by four nibbles, one logical operation
puts their signs in place, two more permutes join them with the low bytes. No rounding happens before the sum.

Escapes come last, 32 at a time, as one more product: a matrix [16, 32] which has each escape's value in its row, times the
activations of their columns.

Programs that read the same tiles of the weight for different rows of activations are neighbours in the grid. So they run at
the same time, and all but the first find the tiles in the L2 cache.

Names end in the letters of their axes, see `tiles`; e counts escapes here where it stands alone.
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.head_decode import decode
from gptoss_nf4.vllm.kernels.products import operand
from gptoss_nf4.vllm.kernels.tiles import LANES
from gptoss_nf4.vllm.kernels.twelve_bits import PLANES, WORDS

PLANE = tl.constexpr(LANES * WORDS)  # words
TILE = tl.constexpr(LANES * WORDS * PLANES)
ESCAPES = tl.constexpr(32)  # at a time


@triton.jit(do_not_specialize=["count", "blocks"])
def product(x, weight, out, count, blocks, R, BM: tl.constexpr, WARPS: tl.constexpr, TWO: tl.constexpr):
    """out[row] = w @ x[row].

    A program takes one row tile, or two neighbours if TWO; the grid is row tiles, then `blocks` blocks of BM rows of x.

    Args:
        x: [count, K] in the weight's dtype. out: [count, N].
        weight: a `Weight` of R row tiles.
    """
    tile = tl.program_id(0) // blocks * (2 if TWO else 1)
    row_m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    row_m = tl.where(row_m < count, row_m, -1)
    next_tile = tl.minimum(tile + 1, R - 1)
    words = weight.words + tile.to(tl.int64) * weight.C * TILE
    next_words = weight.words + next_tile.to(tl.int64) * weight.C * TILE
    warp = tl.arange(0, WARPS)
    ahead = _load(x, words, next_words, row_m, weight, warp, TWO)
    # The first escapes come while the products run. Of two tiles' there is no room in the registers.
    listed = _escapes_from(weight, tile, tl.load(weight.starts + tile))
    table = _load_table(weight, tile)
    next_table = _load_table(weight, next_tile)
    sum_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    next_sum_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    for start in tl.range(0, weight.C, WARPS, num_stages=1):
        codes_wls, low_qwlj, next_codes_wls, next_low_qwlj, x_qMwmk = ahead
        x_wkm = operand(x_qMwmk)
        ahead = _load(x, words, next_words, row_m, weight, start + WARPS + warp, TWO)
        sum_wnm += tl.dot(_weight(codes_wls, low_qwlj, table, weight.SHIFT, x.dtype.element_ty), x_wkm)
        if TWO:
            next_wnk = _weight(next_codes_wls, next_low_qwlj, next_table, weight.SHIFT, x.dtype.element_ty)
            next_sum_wnm += tl.dot(next_wnk, x_wkm)
    sum_nm = _with_escapes(tl.sum(sum_wnm, axis=0), listed, x, weight, tile, row_m)
    _store(out, sum_nm * weight.unscale, row_m, tile, weight.N)
    if TWO:
        next_listed = _escapes_from(weight, next_tile, tl.load(weight.starts + next_tile))
        next_sum_nm = _with_escapes(tl.sum(next_sum_wnm, axis=0), next_listed, x, weight, next_tile, row_m)
        _store(out, next_sum_nm * weight.unscale, row_m, next_tile, weight.N)


@triton.jit
def _load(x, words, next_words, row_m, weight, C_w, TWO: tl.constexpr):
    """What the warps need of input tiles `C_w`: plane 0 [w, l, s] and the others [q, w, l, j] of both row tiles, and x.

    x is [q, M, w, m, k], where M counts groups of eight rows and k the 32 inputs (t e h p) of a half; zeros for row -1.
    Beyond the last input tile the weights are those of the last one, and x is 0.
    """
    BM: tl.constexpr = row_m.shape[0]
    exists_w = C_w < weight.C
    C_w = tl.minimum(C_w, weight.C - 1)
    # Triton spreads lanes and warps over the last axes first, so q and M in front stay in a lane, and all loads of a lane
    # are what it has to hold as operands.
    q = tl.arange(0, 2)
    lane_word = tl.arange(0, 32)[:, None] * 4 + tl.arange(0, 4)[None, :]
    code_wls = C_w[:, None, None] * TILE + lane_word[None, :, :]
    low_qwlj = (C_w[:, None, None] * TILE + lane_word[None, :, :])[None, :, :, :] + (q[:, None, None, None] + 1) * PLANE
    k_qMwmk = C_w[None, None, :, None, None] * 64 + q[:, None, None, None, None] * 32 + tl.arange(0, 32)
    row_qMwmk = tl.reshape(row_m, [1, BM // 8, 1, 8, 1])
    used_qMwmk = (row_qMwmk >= 0) & exists_w[None, None, :, None, None]
    # Weights are read once by each block of rows, x by every program: weights should not push x out of the L1 cache.
    codes_wls = tl.load(words + code_wls, eviction_policy="evict_first")
    low = tl.load(words + low_qwlj, eviction_policy="evict_first")
    next_codes_wls, next_low = codes_wls, low
    if TWO:
        next_codes_wls = tl.load(next_words + code_wls, eviction_policy="evict_first")
        next_low = tl.load(next_words + low_qwlj, eviction_policy="evict_first")
    x_qMwmk = tl.load(x + row_qMwmk.to(tl.int64) * weight.K + k_qMwmk, mask=used_qMwmk, other=0.0)
    return codes_wls, low, next_codes_wls, next_low, x_qMwmk


@triton.jit
def _load_table(weight, tile):
    """The eight bytes of a row tile's table: two int32 [1, 1, 1]."""
    word = weight.table + 2 * tile + tl.zeros([1, 1, 1], tl.int32)
    return tl.load(word), tl.load(word + 1)


@triton.jit
def _weight(codes_wls, low_qwlj, table, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Each warp's tile as operand A, `dtype` [w, n, k] with the inputs in the order (s t h p)."""
    WARPS: tl.constexpr = codes_wls.shape[0]
    weight_wlsprh = decode(codes_wls, low_qwlj, table, SHIFT, dtype)
    weight_wgtsprh = tl.reshape(weight_wlsprh, [WARPS, 8, 4, 4, 2, 2, 2])
    weight_wrgsthp = tl.permute(weight_wgtsprh, [0, 5, 1, 3, 2, 6, 4])
    return tl.reshape(weight_wrgsthp, [WARPS, 16, 64])


@triton.jit
def _escapes_from(weight, tile, start):
    """`ESCAPES` of a row tile's escapes from `start` on: place, -1 beyond the last, and value; both [e]."""
    e = start + tl.arange(0, ESCAPES)
    exists_e = e < tl.load(weight.starts + tile + 1)
    return tl.load(weight.places + e, mask=exists_e, other=-1), tl.load(weight.escapes + e, mask=exists_e, other=0.0)


@triton.jit
def _with_escapes(sum_nm, listed, x, weight, tile, row_m):
    """`sum_nm` and the products of the tile's escapes, of which `listed` are the first."""
    start = tl.load(weight.starts + tile)
    end = tl.load(weight.starts + tile + 1)
    sum_nm += _escaped(listed, x, weight, row_m)
    for more in tl.range(start + ESCAPES, end, ESCAPES, num_stages=1):
        sum_nm += _escaped(_escapes_from(weight, tile, more), x, weight, row_m)
    return sum_nm


@triton.jit
def _escaped(listed, x, weight, row_m):
    """The products of some escapes: float32 [n, m]."""
    place_e, value_e = listed
    value_ne = tl.where(place_e[None, :] % 16 == tl.arange(0, 16)[:, None], value_e[None, :], 0.0)
    used_em = (place_e >= 0)[:, None] & (row_m >= 0)[None, :]
    x_em = x + row_m.to(tl.int64)[None, :] * weight.K + (place_e // 16)[:, None]
    return tl.dot(value_ne.to(x.dtype.element_ty), tl.load(x_em, mask=used_em, other=0.0))


@triton.jit
def _store(out, value_nm, row_m, tile, N):
    """float32 [n, m] to out[row, row of tile]."""
    n = tile * 16 + tl.arange(0, 16)
    valid_nm = (row_m >= 0)[None, :] & (n < N)[:, None]
    tl.store(out + row_m.to(tl.int64)[None, :] * N + n[:, None], value_nm.to(out.dtype.element_ty), mask=valid_nm)


@triton.jit(do_not_specialize=["first", "count"])
def unpack(weight, out, first, count, TILES: tl.constexpr, SCALED: tl.constexpr):
    """The weight's row tiles from `first` on, as they are stored: without escapes.

    Grid: row tiles, input tiles / TILES. The letters are the axes of `tiles`; C is here the input tiles of a program.

    Args:
        weight: a `Weight`. out: [count, K] in its dtype. SCALED: unscale is not 1.
    """
    tile = tl.program_id(0)
    C = tl.program_id(1) * TILES + tl.arange(0, TILES)
    exists_C = C < weight.C
    word_Cls = C[:, None, None] * TILE + tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    low_qClj = word_Cls[None, :, :, :] + (tl.arange(0, 2)[:, None, None, None] + 1) * PLANE
    words = weight.words + (first + tile).to(tl.int64) * weight.C * TILE
    codes_Cls = tl.load(words + word_Cls, mask=exists_C[:, None, None], other=0)
    low_qClj = tl.load(words + low_qClj, mask=exists_C[None, :, None, None], other=0)
    table = _load_table(weight, first + tile)
    weight_Cnk = _in_rows(decode(codes_Cls, low_qClj, table, weight.SHIFT, out.dtype.element_ty))
    if SCALED:
        weight_Cnk = weight_Cnk.to(tl.float32) * weight.unscale
    n = tile * 16 + tl.arange(0, 16)
    k_Ck = C[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(
        out + n.to(tl.int64)[None, :, None] * weight.K + k_Ck[:, None, :],
        weight_Cnk.to(out.dtype.element_ty),
        mask=exists_C[:, None, None] & (n < count)[None, :, None],
    )


@triton.jit
def _in_rows(weight_Clsprh):
    """Decoded weights as [C, n, k], with inputs and rows as the weight has them."""
    TILES: tl.constexpr = weight_Clsprh.shape[0]
    weight_Cgtqeprh = tl.reshape(weight_Clsprh, [TILES, 8, 4, 2, 2, 2, 2, 2])
    return tl.reshape(tl.permute(weight_Cgtqeprh, [0, 6, 1, 3, 2, 4, 7, 5]), [TILES, 16, 64])


@triton.jit(do_not_specialize=["first", "count"])
def unpack_escapes(weight, out, first, count, SCALED: tl.constexpr):
    """Put the escapes of the row tiles from `first` on into `out`, which `unpack` has filled. Grid: row tiles."""
    tile = tl.program_id(0)
    for start in range(tl.load(weight.starts + first + tile), tl.load(weight.starts + first + tile + 1), ESCAPES):
        place_e, value_e = _escapes_from(weight, first + tile, start)
        if SCALED:
            value_e = value_e.to(tl.float32) * weight.unscale
        row_e = tile * 16 + place_e % 16
        used_e = (place_e >= 0) & (row_e < count)
        tl.store(out + row_e.to(tl.int64) * weight.K + place_e // 16, value_e.to(out.dtype.element_ty), mask=used_e)

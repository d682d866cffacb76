"""The product with a weight in 12 bits for many rows of activations. `head` has the one for few, `twelve_bits` the format.

A program holds the sums of some row tiles for `BM` rows of activations. Its warps share the row tiles, not the inputs, so
that each weight is decoded once for all those rows. Weights and activations come through shared memory, some input tiles
ahead. Decoded weights go from registers into the product as operand A, in the order of inputs that `operands` explains.

Escapes come last. Those of neighbouring row tiles stand one after the other, so they are taken together, 32 or 64 at a
time, as one more product. It reads whole columns of the activations; therefore these are given a second time, transposed.

Names end in the letters of their axes, see `tiles`. Here R is the row tiles of a program, and n its rows, (R r g).
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.head import PLANE, TILE
from gptoss_nf4.vllm.kernels.head_decode import decode
from gptoss_nf4.vllm.kernels.operands import operand_a


@triton.jit(do_not_specialize=["count", "blocks"])
def product(
    x,
    columns,
    weight,
    out,
    count,
    blocks,
    padded,
    R,
    BM: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    WGMMA: tl.constexpr,
):
    """out[row] = w @ x[row].

    A program takes TILES row tiles; the grid is row tiles / TILES, then `blocks` blocks of BM rows of x: neighbours read
    the same tiles at the same time, and all but the first find them in the L2 cache.

    Args:
        x: [count, K] in the weight's dtype, in `tiles.operand_order` for WGMMA or not.
        columns: [K, padded], the same transposed, in the weight's order, with padded = blocks * BM. What stands beyond
            count is not used.
        out: [count, N].
        weight: a `Weight` of R row tiles.
        STAGES: a program reads STAGES - 1 input tiles ahead.
        WGMMA: Triton compiles the products to wgmma, else to mma.sync.
    """
    first = tl.program_id(0) // blocks * TILES
    row_m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    used_m = row_m < count
    dtype: tl.constexpr = x.dtype.element_ty
    tile_R = tl.minimum(tl.arange(0, TILES), R - 1 - first)  # beyond the last the last again, which is not stored
    words = weight.words + first.to(tl.int64) * weight.C * TILE
    table = _load_tables(weight, first + tile_R)
    sum_nm = tl.zeros([TILES * 16, BM], tl.float32)
    for C in tl.range(0, weight.C, num_stages=STAGES):
        k = C * 64 + tl.arange(0, 64)
        x_mk = tl.load(x + row_m.to(tl.int64)[:, None] * weight.K + k[None, :], mask=used_m[:, None], other=0.0)
        sum_nm = tl.dot(_weights(words, tile_R, C, weight, table, dtype, WGMMA), tl.trans(x_mk), sum_nm)
    sum_nm = _with_escapes(sum_nm, columns, weight, first, row_m, padded, R, TILES)
    n = first * 16 + tl.arange(0, TILES * 16)
    value_nm = (sum_nm * weight.unscale).to(dtype)
    out_mn = out + row_m.to(tl.int64)[:, None] * weight.N + n[None, :]
    tl.store(out_mn, tl.trans(value_nm), mask=used_m[:, None] & (n < weight.N)[None, :])


@triton.jit
def _load_tables(weight, tile_R):
    """The row tiles' tables, a copy for each lane: two int32 [R, 32, 1]."""
    word_Rl = weight.table + 2 * tile_R[:, None, None] + tl.zeros([1, 32, 1], tl.int32)
    return tl.load(word_Rl), tl.load(word_Rl + 1)


@triton.jit
def _weights(words, tile_R, C, weight, table, dtype: tl.constexpr, WGMMA: tl.constexpr):
    """Operand A: row tiles `tile_R` of input tile C, without escapes, `dtype` [n, k]."""
    TILES: tl.constexpr = tile_R.shape[0]
    lane_word = tl.arange(0, 32)[:, None] * 4 + tl.arange(0, 4)[None, :]
    word_Rls = (tile_R * weight.C + C)[:, None, None] * TILE + lane_word[None, :, :]
    # Plane by plane: so each stands in shared memory as it stands here, without gaps.
    codes_Rls = tl.load(words + word_Rls)
    low_Rljq = tl.join(tl.load(words + word_Rls + PLANE), tl.load(words + word_Rls + 2 * PLANE))
    weight_Rlsprh = decode(codes_Rls, tl.permute(low_Rljq, [3, 0, 1, 2]), table, weight.SHIFT, dtype)
    return operand_a(tl.reshape(weight_Rlsprh, [TILES, 8, 4, 4, 2, 2, 2]), WGMMA)


@triton.jit
def _with_escapes(sum_nm, columns, weight, first, row_m, padded, R, TILES: tl.constexpr):
    """`sum_nm` and the products of the escapes of `TILES` row tiles from `first` on."""
    # Each time takes three reads, one after the other; with 128 rows of x, 64 escapes take too many registers.
    AT_A_TIME: tl.constexpr = 64 if row_m.shape[0] < 128 else 32
    end_R = tl.load(weight.starts + tl.minimum(first + 1 + tl.arange(0, TILES), R))
    end = tl.load(weight.starts + tl.minimum(first + TILES, R))
    for start in tl.range(tl.load(weight.starts + first), end, AT_A_TIME, num_stages=1):
        e = start + tl.arange(0, AT_A_TIME)
        exists_e = e < end
        place_e = tl.load(weight.places + e, mask=exists_e, other=0)
        value_e = tl.load(weight.escapes + e, mask=exists_e, other=0.0)
        row_e = tl.sum((e[:, None] >= end_R[None, :]).to(tl.int32), axis=1) * 16 + place_e % 16
        value_ne = tl.where(row_e[None, :] == tl.arange(0, TILES * 16)[:, None], value_e[None, :], 0.0)
        x_em = tl.load(columns + (place_e // 16)[:, None] * padded + row_m[None, :], mask=exists_e[:, None], other=0.0)
        sum_nm = tl.dot(value_ne.to(columns.dtype.element_ty), x_em, sum_nm)
    return sum_nm

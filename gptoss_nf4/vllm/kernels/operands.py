"""What the products of `large` multiply: decoded weights as operand A, activations as operand B.

Names end in the letters of their axes, see `tiles`. R is the row tiles of operand A, a power of two.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.decode import COMPILED, decode, decode_scaled, decode_times, halves, lookup_scaled


class Tiles(NamedTuple):
    """Pointers to row tiles: codes int32 [R, C, l, s], absmax float16 [R, B, g r].

    Where blocks run along the outputs, absmax is [B, in] of the expert, in the dtype of x.
    """

    codes: tl.tensor
    absmax: tl.tensor


@triton.jit
def tiles_from(weight, expert, first):
    """All row tiles of `expert` from number `first` on, counted over all experts."""
    codes = weight.codes + first * weight.C * (32 * weight.S)
    if weight.ROW_TILES_PER_BLOCK:
        absmax = weight.absmax + expert * weight.B * (weight.C * (16 * weight.S))
    else:
        absmax = weight.absmax + first * weight.B * 16
    return Tiles(codes, absmax)


@triton.jit
def weights(
    tiles,
    tile_R,
    exists_R,
    C,
    weight,
    decoder,
    dtype: tl.constexpr,
    BM: tl.constexpr,
    WGMMA: tl.constexpr,
    SHARED_TABLE: tl.constexpr,
):
    """Operand A: row tiles `tile_R` of input tile C, times absmax and the codebook's factor, `dtype` [n, k].

    decoder: what `fill_shared` (if SHARED_TABLE) or `load_table` gave. BM: rows of activations, whose sums take registers.
    """
    S: tl.constexpr = weight.S
    tile_Rls = tile_R[:, None, None]
    exists_Rls = exists_R[:, None, None]
    place_Rls = (tile_Rls * weight.C + C) * (32 * S) + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :]
    words_Rls = tl.load(tiles.codes + place_Rls, mask=exists_Rls, other=0)
    if weight.ROW_TILES_PER_BLOCK:
        weight_Rgtsprh = _times_inputs(words_Rls, tiles, tile_R, exists_R, C, weight, decoder, dtype, SHARED_TABLE)
    else:
        # Within the decoding it takes fewer instructions, after it fewer registers.
        in_decoding: tl.constexpr = BM < 128 or SHARED_TABLE
        weight_Rgtsprh = _times_rows(
            words_Rls, tiles, tile_R, exists_R, C, weight, decoder, dtype, in_decoding, SHARED_TABLE
        )
    return operand_a(weight_Rgtsprh, WGMMA)


@triton.jit
def operand_a(weight_Rgtsprh, WGMMA: tl.constexpr):
    """Decoded weights [R, g, t, s, p, r, h] as operand A [n, k].

    k is in the order in which they stand in a lane's registers already, as Triton lays out operand A: (s h t p) for wgmma,
    (s t h p) for mma.sync.
    """
    R: tl.constexpr = weight_Rgtsprh.shape[0]
    S: tl.constexpr = weight_Rgtsprh.shape[3]
    if WGMMA:
        weight_Rrgk = tl.permute(weight_Rgtsprh, [0, 5, 1, 3, 6, 2, 4])
    else:
        weight_Rrgk = tl.permute(weight_Rgtsprh, [0, 5, 1, 3, 2, 6, 4])
    return tl.reshape(weight_Rrgk, [R * 16, 16 * S])


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
        weight_Rgtsprh = tl.reshape(weight_Rlsprh, [tile_R.shape[0], 8, 4, S, 2, 2, 2])
    else:
        pairs_Rg = pairs_R + tl.arange(0, 8)[None, :, None]
        absmax0_Rg, absmax1_Rg = halves(tl.load(pairs_Rg, mask=exists_Rls, other=0))
        absmax_Rgr = tl.join(absmax0_Rg, absmax1_Rg).to(dtype)
        weight_Rgtsprh = tl.reshape(decode(words_Rls, decoder, dtype), [tile_R.shape[0], 8, 4, S, 2, 2, 2])
        weight_Rgtsprh = weight_Rgtsprh * tl.reshape(absmax_Rgr, [tile_R.shape[0], 8, 1, 1, 1, 2, 1])
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
    pairs_Rgtsh = tl.broadcast_to(tl.reshape(pairs_Rtqj, [tile_R.shape[0], 1, 4, S, 2]), [tile_R.shape[0], 8, 4, S, 2])
    absmax0_Rls, absmax1_Rls = tl.split(tl.reshape(pairs_Rgtsh, [tile_R.shape[0], 32, S, 2]))
    weight_Rlsprh = decode_times(words_Rls, absmax0_Rls, absmax1_Rls, decoder, dtype, SHARED_TABLE)
    return tl.reshape(weight_Rlsprh, [tile_R.shape[0], 8, 4, S, 2, 2, 2])


@triton.jit
def activations(x, row_m, used_m, C, K, S: tl.constexpr, WGMMA: tl.constexpr):
    """Operand B: x[row_m] of input tile C, [k, m] in the same order of k; zeros where not `used_m`."""
    BM: tl.constexpr = row_m.shape[0]
    k = C * (16 * S) + tl.arange(0, 16 * S)
    x_mk = tl.load(x + row_m[:, None] * K + k[None, :], mask=used_m[:, None], other=0.0)
    if not WGMMA:
        x_mshtp = tl.reshape(x_mk, [BM, S, 2, 4, 2])
        x_msthp = tl.permute(x_mshtp, [0, 1, 3, 2, 4])
        x_mk = tl.reshape(x_msthp, [BM, 16 * S])
    return tl.trans(x_mk)

"""Packed weights back to dense ones, for products so large that reading the weight no longer matters."""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.decode import decode, load_table

INPUT_TILES = 4  # of a program


@triton.jit
def dequantize(weight, out, N, K, TILES: tl.constexpr):
    """The dense weight, rounded once more to the dtype of `out`.

    Grid: row tiles, input tiles / TILES. The letters are the axes of `tiles`; C is here the input tiles of a program.

    Args:
        weight: a `Weight` of one expert.
        out: [N, K] float16 or bfloat16.
    """
    S: tl.constexpr = weight.S
    tile = tl.program_id(0)
    C = tl.program_id(1) * TILES + tl.arange(0, TILES)
    exists_C = C < weight.C
    words_Cls = tl.load(
        weight.codes
        + (tile.to(tl.int64) * weight.C + C)[:, None, None] * (32 * S)
        + tl.arange(0, 32)[None, :, None] * S
        + tl.arange(0, S)[None, None, :],
        mask=exists_C[:, None, None],
        other=0,
    )
    row = tl.arange(0, 16)
    place = row % 8 * 2 + row // 8  # (r g) -> (g r)
    if weight.ROW_TILES_PER_BLOCK:
        input_Ck = C[:, None] * (16 * S) + tl.arange(0, 16 * S)[None, :]
        absmax_Ck = tl.load(
            weight.absmax + tile // weight.ROW_TILES_PER_BLOCK * K + input_Ck, mask=exists_C[:, None], other=0.0
        )
    else:
        absmax_Cn = tl.load(
            weight.absmax + (tile * weight.B + C // weight.TILES_PER_BLOCK)[:, None] * 16 + place[None, :],
            mask=exists_C[:, None],
            other=0.0,
        )
    weight_Clsprh = decode(words_Cls, load_table(weight.table), out.dtype.element_ty)
    weight_Cgtqeprh = tl.reshape(weight_Clsprh, [TILES, 8, 4, S // 2, 2, 2, 2, 2])
    weight_Crgqtehp = tl.permute(weight_Cgtqeprh, [0, 6, 1, 3, 2, 4, 7, 5])
    weight_Cnk = tl.reshape(weight_Crgqtehp, [TILES, 16, 16 * S]).to(tl.float32)
    if weight.ROW_TILES_PER_BLOCK:
        weight_Cnk = weight_Cnk * (absmax_Ck.to(tl.float32) * weight.unscale)[:, None, :]
    else:
        weight_Cnk = weight_Cnk * (absmax_Cn.to(tl.float32) * weight.unscale)[:, :, None]
    n = tile * 16 + row
    k_Ck = C[:, None] * (16 * S) + tl.arange(0, 16 * S)[None, :]
    tl.store(
        out + n.to(tl.int64)[None, :, None] * K + k_Ck[:, None, :],
        weight_Cnk.to(out.dtype.element_ty),
        mask=exists_C[:, None, None] & (n < N)[None, :, None],
    )

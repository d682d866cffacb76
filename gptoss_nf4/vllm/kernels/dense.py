"""Packed weights back to dense ones, for products so large that reading the weight no longer matters."""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.codebook import decode, load_table


@triton.jit
def dequantize(
    codes, absmax, table, inverse_factor, out, N, K, row_tiles, input_tiles, absmax_stride,
    PER_ABSMAX: tl.constexpr, S: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """codes int32 [row_tiles, input_tiles, 32, S], absmax float16 [row_tiles, absmax_stride, 16] -> out [N, K]."""
    tile = tl.program_id(0)
    block = tl.program_id(1) * TILES + tl.arange(0, TILES)
    ok = block < input_tiles
    word = tl.load(
        codes + (tile.to(tl.int64) * input_tiles + block)[:, None, None] * (32 * S)
        + tl.arange(0, 32)[None, :, None] * S + tl.arange(0, S)[None, None, :],
        mask=ok[:, None, None], other=0,
    )  # fmt: skip
    row = tl.arange(0, 16)
    pair = row % 8 * 2 + row // 8  # where `tiles.pack_absmax` puts a row
    places = (tile * absmax_stride + block // PER_ABSMAX)[:, None] * 16 + pair[None, :]
    scale = tl.load(absmax + places, mask=ok[:, None], other=0.0)
    weight = decode(word, table, load_table(table), out.dtype.element_ty, ASM)
    weight = tl.reshape(weight, [TILES, 8, 4, S // 2, 2, 2, 2, 2])  # g t s/2 s%2 p r h
    weight = tl.permute(weight, [0, 6, 1, 3, 2, 4, 7, 5])  # r g | s/2 t s%2 h p
    weight = tl.reshape(weight, [TILES, 16, 16 * S]).to(tl.float32) * (scale * inverse_factor)[:, :, None]
    n = tile * 16 + row
    k = block[:, None] * (16 * S) + tl.arange(0, 16 * S)[None, :]
    tl.store(
        out + n.to(tl.int64)[None, :, None] * K + k[:, None, :], weight.to(out.dtype.element_ty),
        mask=ok[:, None, None] & (n < N)[None, :, None],
    )  # fmt: skip

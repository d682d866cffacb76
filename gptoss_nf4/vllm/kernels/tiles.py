"""The order in which the kernels want codes and absmax in memory. Pure functions on tensors.

A weight is cut into tiles of 16 rows by 64 inputs (by 32 where the blocksize is 32: a tile must not cross a
block). One warp multiplies a tile by four (two) tensor-core instructions m16n8k16, with the weight as operand
A. The codes are stored so that one 16-byte load brings a lane exactly the weights that it has to hold for these
instructions (PTX ISA, "Matrix fragments for mma.m16n8k16"; g and t below are its groupID and
threadID_in_group), without shuffles and without shared memory.

A tile. Lane 4g + t has rows g and g + 8, and in each half of 32 inputs the eight neighbours from 8t on:

                                      q = 0                                       q = 1
                   t = 0         t = 1         t = 2         t = 3         t = 0
      inputs    0-3    4-7    8-11  12-15   16-19  20-23   24-27  28-31   32-35  36-39   ...
    row  0    |    lane 0   |    lane 1   |    lane 2   |    lane 3   |    lane 0   |
    row  1    |    lane 4   |    lane 5   |    lane 6   |    lane 7   |    lane 4   |
     ...      |             |             |             |             |             |
    row  7    |    lane 28  |    lane 29  |    lane 30  |    lane 31  |    lane 28  |
    row  8    |    lane 0   |    lane 1   |    lane 2   |    lane 3   |    lane 0   |
     ...      |             |             |             |             |             |
    row 15    |    lane 28  |    lane 29  |    lane 30  |    lane 31  |    lane 28  |
       word        0     1       0     1       0     1       0     1       2     3     ...

A word of a lane: four neighbouring inputs of two rows. The numbers are those of the nibbles, 0 for the lowest
four bits:

                 first   second   third   fourth input
    row g          0        1       4        5
    row g + 8      2        3       6        7

Axes. In this package the name of a tensor ends in the letters of its axes, from the slowest on: `words_wls` is
[w, l, s].

    letter   size                what it counts
    E        experts             experts of this rank
    R        rows / 16           tiles of rows
    C        inputs / 64 (32)    tiles of inputs (columns)
    B        inputs / blocksize  blocks of inputs with one absmax

    row of a tile = 8r + g, input of a tile = 32q + 8t + 4e + 2h + p:
    r        2                   halves of the rows
    g        8                   rows of a half
    q        2 (1)               halves of the inputs
    t        4                   eights of a half
    e        2                   fours of an eight
    h        2                   twos of a four
    p        2                   inputs of a two

    the same as stored, lane l = 4g + t, word s = 2q + e, nibble = 4h + 2r + p:
    l        32                  lanes
    s        4 (2)               32-bit words of a lane; the size is called S

    in a running kernel:
    w        WARPS               warps, each with a C of its own
    n        16, or 16 R         rows of the weight, (r g) or (R r g), which are columns of the result
    k        16 S                inputs of a tile, in any order that weight and activations share
    m        BM                  rows of activations; with M in front of it, eight of M groups

Codes only move. absmax becomes float16 in units of 1 / ABSMAX_FACTOR: at most 2^-11 off, a quarter of what
rounding the codebook to bfloat16 does, and half the bytes. Rows g and g + 8 stand side by side, since a lane
needs both.

Where blocks run along the outputs (`format/blocks.py`), codes are packed the same, and absmax [B, inputs] stays in its
order: B counts blocks of outputs then. The kernels multiply activations by it, so it takes their dtype. bfloat16 rounds
it by 2^-8 at most, as the products of `large` do in either direction.
"""

from math import ceil, inf, log2

import torch

ROWS = 16  # of a tile
MAX_INPUTS, MIN_INPUTS = 64, 32  # of a tile
LANES = 32  # of a warp
ABSMAX_FACTOR = 256.0  # absmax between 2.4e-7 and MAX_PACKED_ABSMAX keeps all 11 bits
MAX_PACKED_ABSMAX = 255.0


def tile_inputs(blocksize: int) -> int:
    """Inputs of a tile, 64 or 32, of a weight whose blocks run along the inputs."""
    return min(MAX_INPUTS, blocksize)


def tile_inputs_across(inputs: int) -> int:
    """The same where they run along the outputs: the weight has so many inputs, a multiple of 32."""
    return MAX_INPUTS if inputs % MAX_INPUTS == 0 else MIN_INPUTS


def padded_rows(rows: int) -> int:
    """`rows` rounded up to whole tiles."""
    return -(-rows // ROWS) * ROWS


def pack_codes(codes: torch.Tensor, inputs: int) -> torch.Tensor:
    """Codes as stored in a checkpoint to codes in tiles.

    Args:
        codes: uint8 [..., rows, in / 2], first element in the high nibble.
        inputs: of a tile, 32 or 64; they divide the weight's.

    Returns:
        int32 [..., R, C, 32, S]. Rows beyond the weight's are code 0.
    """
    *batch, rows, half = codes.shape
    row_tiles, input_tiles = padded_rows(rows) // ROWS, 2 * half // inputs
    bytes_RrgCqteh = pad_rows(codes, -2).view(-1, row_tiles, 2, 8, input_tiles, inputs // 32, 4, 2, 2)
    bytes_RCgtqehr = bytes_RrgCqteh.permute(0, 1, 4, 3, 6, 5, 7, 8, 2).contiguous()
    words = bytes_RCgtqehr.view(-1).view(torch.int32)
    return swap_nibbles(words).view(*batch, row_tiles, input_tiles, LANES, inputs // 16)


def swap_nibbles(words: torch.Tensor) -> torch.Tensor:
    """`words` int32, with the two nibbles of each byte exchanged: a checkpoint's first input is high, a tile's is low."""
    low = 0x0F0F0F0F
    return ((words >> 4) & low) | ((words & low) << 4)


def pad_rows(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """`rows` with zeros behind those along `dim`, a negative number, up to whole tiles. No copy where there are."""
    missing = padded_rows(rows.shape[dim]) - rows.shape[dim]
    return torch.nn.functional.pad(rows, (0, 0) * (-dim - 1) + (0, missing)) if missing else rows


def unpack_codes(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `pack_codes`: int32 [..., R, C, 32, S] -> uint8 [..., rows, in / 2]."""
    *batch, row_tiles, input_tiles, _, words = packed.shape
    flat = packed.contiguous().view(torch.uint8).view(-1, 1)
    nibbles = torch.cat((flat & 15, flat >> 4), dim=1)
    nibbles_RCgtqehrp = nibbles.view(-1, row_tiles, input_tiles, 8, 4, words // 2, 2, 2, 2, 2)
    nibbles_RrgCqtehp = nibbles_RCgtqehrp.permute(0, 1, 8, 3, 2, 5, 4, 6, 7, 9).contiguous()
    pairs = nibbles_RrgCqtehp.view(-1, 2)
    codes = (pairs[:, 0] << 4) | pairs[:, 1]
    return codes.view(*batch, row_tiles * ROWS, -1)[..., :rows, :].contiguous()


def pack_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """absmax as stored in a checkpoint to absmax in tiles.

    Args:
        absmax: float32 [..., rows, B], at most MAX_PACKED_ABSMAX (beyond, the result is infinite).

    Returns:
        float16 [..., R, B, 16] in units of 1 / ABSMAX_FACTOR, the rows of a tile in the order (g r): 0, 8, 1, 9, ...
        Rows beyond the weight's are 0.
    """
    *batch, rows, blocks = absmax.shape
    row_tiles = padded_rows(rows) // ROWS
    absmax = pad_rows((absmax * ABSMAX_FACTOR).to(torch.float16), -2)
    absmax_RrgB = absmax.view(*batch, row_tiles, 2, 8, blocks)
    absmax_RBgr = absmax_RrgB.movedim(-1, -3).transpose(-1, -2)
    return absmax_RBgr.reshape(*batch, row_tiles, blocks, ROWS)


def pack_absmax_of_inputs(absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """absmax of blocks along the outputs, float32 [..., B, in], at most MAX_PACKED_ABSMAX: `dtype`, times ABSMAX_FACTOR."""
    return (absmax * ABSMAX_FACTOR).to(dtype)


def fitting_power(absmax: torch.Tensor) -> float:
    """The power of two that brings the largest of absmax, float16 or bfloat16 of any shape, into (1/2, 1].

    Activations times it stay in float16 then: a product is no larger than the activation, and what it loses below float16's
    normal numbers is little beside the largest. 1 where there is no such power.
    """
    largest = float(absmax.abs().max()) if absmax.numel() else 0.0
    return 2.0 ** -ceil(log2(largest)) if 0 < largest < inf else 1.0


def pack(weight: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., rows, in / 2] and absmax [..., rows, in / blocksize] by `pack_codes` and `pack_absmax`."""
    return pack_codes(weight, tile_inputs(blocksize)), pack_absmax(absmax)


def pack_across(weight: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`pack` where blocks run along the outputs, for activations in `dtype`: codes, absmax, and by what it is multiplied.

    weight: uint8 [..., rows, in / 2]. absmax: float32 [..., rows / blocksize, in].
    """
    codes = pack_codes(weight, tile_inputs_across(absmax.shape[-1]))
    packed = pack_absmax_of_inputs(absmax, dtype)
    power = fitting_power(packed)
    return codes, packed * power, ABSMAX_FACTOR * power


def gate_and_up_tiles(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of w13, gate and up interleaved along `dim`, as 16 gate rows, 16 up rows, and so on; padded with zeros."""
    rows = rows.movedim(dim, 0)
    half = rows.shape[0] // 2
    if half % ROWS:
        rows = torch.cat((rows, rows.new_zeros(2 * (padded_rows(half) - half), *rows.shape[1:])))
    tiles = rows.unflatten(0, (-1, ROWS, 2)).transpose(1, 2)
    return tiles.flatten(0, 2).movedim(0, dim)


def operand_order(x: torch.Tensor, inputs: int, wgmma: bool = True) -> torch.Tensor:
    """Activations [..., in] in the order in which inputs meet in the instructions: (q e h t p) in each tile of `inputs`.

    That is the order for wgmma, which the kernels of `large` read on every GPU. For mma.sync, where Triton gives each lane
    four neighbours, it is (q e t h p). So the 16 inputs of one instruction are neighbours.
    """
    x_Cqtehp = x.view(*x.shape[:-1], -1, inputs // 32, 4, 2, 2, 2)
    x_ordered = x_Cqtehp.movedim(-4, -2 if wgmma else -3)
    return x_ordered.reshape(x.shape)

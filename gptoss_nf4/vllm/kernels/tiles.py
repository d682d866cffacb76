"""The order in which the kernels want codes and absmax in memory. Pure functions on tensors.

A tile is 16 rows by 64 inputs (by 32 where the blocksize is 32), the weights that one warp multiplies with four (two)
tensor-core instructions m16n8k16. Its bytes are stored so that a lane's single 16-byte load brings exactly the weights
that this lane holds as that instruction's operand A (PTX ISA, "Matrix fragments for mma.m16n8k16"): no shared memory,
no shuffle. Which inputs meet in which instruction is free, as long as the activations agree: lane 4g + t, word s,
nibble p + 2r + 4h is the weight of row 8r + g and input 32 (s / 2) + 8t + 4 (s % 2) + 2h + p, so that the activations
that a lane holds as operand B are 8 neighbours too, one 16-byte load.

Codes only move. absmax becomes float16, in units of 1 / ABSMAX_FACTOR: at most 2^-11 off, a quarter of what rounding the
codebook to bfloat16 does, and half the bytes. The pair of rows that a lane holds, g and g + 8, is adjacent.
"""

import torch

ROWS = 16  # of a tile
MAX_INPUTS = 64
LANES = 32
ABSMAX_FACTOR = 256.0  # absmax between 2.4e-7 and MAX_PACKED_ABSMAX keeps all 11 bits
MAX_PACKED_ABSMAX = 255.0


def tile_inputs(blocksize: int) -> int:
    """Inputs of a tile: a tile must not cross a block."""
    return min(MAX_INPUTS, blocksize)


def padded_rows(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def pack_codes(codes: torch.Tensor, inputs: int) -> torch.Tensor:
    """uint8 [..., rows, in / 2], first element in the high nibble -> int32 [..., tiles of rows, tiles of inputs, 32, s].

    `inputs` of a tile divide the weight's; missing rows of the last tile are code 0.
    """
    *batch, rows, half = codes.shape
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padded_rows(rows) - rows))
    nibbles = torch.stack((codes >> 4, codes & 15), dim=-1)
    #                          [..., R, r, g, C, s / 2, t, s % 2, h, p]
    nibbles = nibbles.view(-1, padded_rows(rows) // ROWS, 2, 8, 2 * half // inputs, inputs // 32, 4, 2, 2, 2)
    nibbles = nibbles.permute(0, 1, 4, 3, 6, 5, 7, 8, 2, 9).contiguous()  # [..., R, C, g, t, s / 2, s % 2, h, r, p]
    pairs = nibbles.view(-1, 2)
    packed = (pairs[:, 0] | (pairs[:, 1] << 4)).view(torch.int32)
    return packed.view(*batch, padded_rows(rows) // ROWS, 2 * half // inputs, LANES, inputs // 16)


def unpack_codes(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `pack_codes`: uint8 [..., rows, in / 2]."""
    *batch, row_tiles, input_tiles, _, words = packed.shape
    flat = packed.contiguous().view(torch.uint8).view(-1, 1)
    nibbles = torch.cat((flat & 15, flat >> 4), dim=1)
    nibbles = nibbles.view(-1, row_tiles, input_tiles, 8, 4, words // 2, 2, 2, 2, 2)  # R, C, g, t, s / 2, s % 2, h, r, p
    nibbles = nibbles.permute(0, 1, 8, 3, 2, 5, 4, 6, 7, 9).contiguous().view(-1, 2)
    codes = (nibbles[:, 0] << 4) | nibbles[:, 1]
    return codes.view(*batch, row_tiles * ROWS, -1)[..., :rows, :].contiguous()


def pack_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """float32 [..., rows, blocks] -> float16 [..., tiles of rows, blocks, 16], rows of a tile in the order 0, 8, 1, 9, ...;
    missing rows of the last tile are 0. Infinite beyond MAX_PACKED_ABSMAX."""
    *batch, rows, blocks = absmax.shape
    absmax = torch.nn.functional.pad(absmax * ABSMAX_FACTOR, (0, 0, 0, padded_rows(rows) - rows)).to(torch.float16)
    tiles = absmax.view(*batch, -1, 2, ROWS // 2, blocks)  # r g blocks
    return tiles.movedim(-1, -3).transpose(-1, -2).reshape(*batch, padded_rows(rows) // ROWS, blocks, ROWS)


def pack(weight: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., rows, in / 2] and absmax [..., rows, in / blocksize] in the kernels' order."""
    return pack_codes(weight, tile_inputs(blocksize)), pack_absmax(absmax)


def gate_and_up_tiles(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of w13, gate and up interleaved along `dim`, as 16 gate rows, 16 up rows, and so on; padded with zeros."""
    rows = rows.movedim(dim, 0)
    half = rows.shape[0] // 2
    padded = rows.new_zeros(2 * padded_rows(half), *rows.shape[1:])
    padded[: 2 * half] = rows
    tiles = padded.view(-1, ROWS, 2, *rows.shape[1:]).transpose(1, 2)
    return tiles.reshape(padded.shape).movedim(0, dim)


def operand_order(x: torch.Tensor, inputs: int) -> torch.Tensor:
    """Activations [..., in] as the prefill kernels want them in memory: input 16s + 8h + 2t + p of a tile is the one that
    meets the weight of lane t, word s, nibble bits h and p."""
    parts = x.view(*x.shape[:-1], -1, inputs // 32, 4, 2, 2, 2)  # s / 2, t, s % 2, h, p
    return parts.movedim(-4, -2).reshape(x.shape)

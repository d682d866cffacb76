"""A dense 16-bit weight in 12 bits a weight, bit for bit: pure functions. The kernels are in `head` and `head_large`.

Trained weights use few exponents. So the exponent's upper bits need not be stored as they are: three bits choose one of
eight values that a table lists.

    bfloat16     s eeeeeee | e mmmmmmm           the key: sign and upper exponent bits; the low byte: all below
    float16      s eeee | e mmmmmmm | 000        the same, three bits further up

The low byte is stored as it is, and the key as a nibble: its sign, and the place of the rest in the table. A value of the
table covers two binades, so eight of them cover 16. Each tile of 16 rows has a table of its own, with the values that are
most frequent there. Value 0 is always in it: zeros need it.

A float16 weight has to be a bfloat16 one too, as heads are that were trained in bfloat16 and cast for serving: its three
lowest bits are 0. Where float16 is subnormal, that need not be so. Therefore the weight is first multiplied by a power of
two, which is exact and makes the smallest value a normal one (`scale_of`). The kernels divide their sums by it.

What the nibble and the byte cannot say is an *escape*: stored as zero here, and listed beside it, in the order of row
tiles, with its place and value. The kernels add its products. Of normally distributed weights 0.03 % are escapes.

The order. Tiles of 16 rows by 64 inputs, lanes, words and axes are those of `tiles`: word s = 2q + e of lane l has eight
weights (h, r, p). A tile is three planes of [32, 4] words, so that each 16-byte load of a warp is 512 bytes without gaps:

    plane 0         nibbles: word [l, s]. Nibble 4h + 2r + p has the place in the table, in its three lower bits. The
                    fourth is a sign, where `head` needs it: bit 8j + 7 belongs to weight j = 2r + p of h = 0, and bit
                    8j + 3 to weight j of h = 1.
    plane 1 + q     low bytes: word [l, (e h)], byte 2r + p.
"""

from typing import NamedTuple

import torch

from gptoss_nf4.vllm.kernels.tiles import LANES, MAX_INPUTS, ROWS, padded_rows

PLANES = 3
WORDS = 4  # of a lane in a plane
TABLE = 8  # values of a table
SHIFTS = {torch.bfloat16: 0, torch.float16: 3}  # how far the low byte stands above bit 0
MAX_ESCAPES = 1 / 256  # of the weights; beyond, the lists cost more time than they save (see `benchmarks.head`)
SMALLEST_FLOAT16 = 2.0**-24
SMALLEST_NORMAL_FLOAT16 = 2.0**-14
CHUNK = 512  # row tiles that are packed at a time, 24 million weights of gpt-oss: temporary tensors take 0.5 GB


class TwelveBits(NamedTuple):
    """A packed weight [rows, in]; R is its number of row tiles, C that of its input tiles, E that of its escapes."""

    words: torch.Tensor
    """int32 [R, C, 3, 32, 4], the planes above."""
    table: torch.Tensor
    """int32 [R, 2]: the eight values of each row tile, in bytes, the first in the lowest byte."""
    starts: torch.Tensor
    """int32 [R + 1]: where each row tile's escapes begin and end."""
    places: torch.Tensor
    """int32 [E]: column * 16 + row of the tile."""
    escapes: torch.Tensor
    """[E] in the weight's dtype, multiplied by the scale."""
    rows: int
    """Of the weight, without padding."""
    scale: float
    """A power of two, by which the weight was multiplied before it was packed."""

    @property
    def inputs(self) -> int:
        return self.words.shape[1] * MAX_INPUTS

    @property
    def dtype(self) -> torch.dtype:
        return self.escapes.dtype

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.words, self.table, self.starts, self.places, self.escapes))


def why_not(weight: torch.Tensor) -> str | None:
    """Why this weight [rows, in] cannot be packed, known from its shape and dtype; None if it may be."""
    if weight.dtype not in SHIFTS:
        return f"dtype {weight.dtype}, expected float16 or bfloat16"
    if weight.ndim != 2 or weight.numel() == 0 or weight.shape[1] % MAX_INPUTS:
        return f"shape {list(weight.shape)}, expected a matrix whose inputs are a multiple of {MAX_INPUTS}"
    if ROWS * weight.shape[1] >= 1 << 31:
        return f"{weight.shape[1]} inputs, expected less than {(1 << 31) // ROWS}"
    return None


def pack(weight: torch.Tensor) -> TwelveBits | str:
    """Pack a weight [rows, in], float16 or bfloat16, contiguous; or say why it is better left dense, in a few words."""
    if reason := why_not(weight):
        return reason
    low, high = weight.aminmax()
    largest = max(-float(low), float(high))
    if not largest <= torch.finfo(weight.dtype).max:
        return "a value that is infinite or no number"
    scale = scale_of(largest, weight.dtype)
    rows, inputs = weight.shape
    row_tiles = padded_rows(rows) // ROWS
    words = weight.new_empty(row_tiles, inputs // MAX_INPUTS, PLANES, LANES, WORDS, dtype=torch.int32)
    table = weight.new_empty(row_tiles, TABLE, dtype=torch.uint8)
    counts, places, values = [], [], []
    for first in range(0, row_tiles, CHUNK):
        tiles = slice(first, first + CHUNK)
        part = weight[first * ROWS : (first + CHUNK) * ROWS]
        part = torch.nn.functional.pad(part, (0, 0, 0, padded_rows(len(part)) - len(part)))
        bits = (part if scale == 1 else part * scale).view(torch.int16).view(-1, ROWS * inputs)
        key, low_byte, fits = _split(bits, SHIFTS[weight.dtype])
        table[tiles] = _most_frequent(key)
        index, listed = _places_in(table[tiles], key)
        escapes = ~(fits & listed)
        words[tiles] = _arrange(index, bits < 0, low_byte, escapes, inputs)
        tile, place = escapes.nonzero(as_tuple=True)
        counts.append(torch.bincount(tile, minlength=len(bits)))
        places.append((place % inputs * ROWS + place // inputs).int())
        values.append(bits[tile, place].view(weight.dtype))
        if sum(map(len, places)) > MAX_ESCAPES * weight.numel():
            return f"exponents that spread too far: more than {MAX_ESCAPES:.2%} of the weights do not fit into 12 bits"
    starts = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0)).int()
    return TwelveBits(words, table.view(torch.int32), starts, torch.cat(places), torch.cat(values), rows, scale)


def scale_of(largest: float, dtype: torch.dtype) -> float:
    """The power of two by which a weight with this largest magnitude is multiplied: the products are exact.

    For float16 large enough, if it can be, to make the smallest value above 0 normal. For bfloat16, whose subnormal values
    have as many bits as its normal ones where they matter, 1.
    """
    scale = 1.0
    if dtype == torch.float16:
        while SMALLEST_FLOAT16 * scale < SMALLEST_NORMAL_FLOAT16 and largest * scale * 2 <= torch.finfo(dtype).max:
            scale *= 2
    return scale


def unpack(packed: TwelveBits) -> torch.Tensor:
    """The weight [rows, in] that was packed. The plain way, for tests; `head_launch.dequantize` is the kernel."""
    shift = SHIFTS[packed.dtype]
    word, *low = packed.words.long().unbind(2)  # [R, C, l, s] and, for each q, [R, C, l, (e h)]
    low = torch.stack([each.unflatten(-1, (2, 2)) for each in low], 3).flatten(3, 4)  # [R, C, l, s, h]
    table = packed.table.view(torch.uint8).long()
    of_tile = torch.arange(len(table), device=table.device).view(-1, 1, 1, 1)
    weights = []
    for h in range(2):
        for j in range(4):
            key = table[of_tile, (word >> (4 * (4 * h + j))) & 7]
            sign = (word >> (8 * j + 7 - 4 * h)) & 1
            weights.append((sign << 15) | (((key << 8) | ((low[..., h] >> (8 * j)) & 255)) << shift))
    bits_RCgtqehrp = torch.stack(weights, -1).to(torch.int16).view(*word.shape[:2], 8, 4, 2, 2, 2, 2, 2)
    bits_RrgCqtehp = bits_RCgtqehrp.permute(0, 7, 2, 1, 4, 3, 5, 6, 8)
    bits = bits_RrgCqtehp.reshape(len(table), -1)
    count = packed.starts.diff()
    tile = torch.arange(len(table), device=table.device).repeat_interleave(count)
    bits = bits.view(-1, packed.inputs)
    bits[tile * ROWS + packed.places % ROWS, packed.places.long() // ROWS] = packed.escapes.view(torch.int16)
    weight = bits.view(packed.dtype)[: packed.rows]
    return weight if packed.scale == 1 else weight / packed.scale


def _split(bits: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patterns int16 -> the key without its sign and the low byte, both uint8, and whether they say all, bool."""
    key = ((bits >> (8 + shift)) & ((1 << (7 - shift)) - 1)).to(torch.uint8)
    low_byte = ((bits >> shift) & 255).to(torch.uint8)
    return key, low_byte, (bits & ((1 << shift) - 1)) == 0


def _most_frequent(key: torch.Tensor) -> torch.Tensor:
    """Of keys uint8 [R, n] 0 and the seven most frequent others of each row: uint8 [R, 8]."""
    count = torch.zeros(len(key), 128, dtype=torch.int64, device=key.device)
    for each in range(int(key.min()), int(key.max()) + 1):  # a handful; a histogram by atomics takes longer
        count[:, each] = (key == each).sum(-1)
    count[:, 0] = key.shape[1] + 1  # the first
    return count.topk(TABLE).indices.to(torch.uint8)


def _places_in(table: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of the keys [R, n] stands in its row's table [R, 8]: uint8 [R, n], and whether it does."""
    index, listed = torch.zeros_like(key), key == table[:, :1]
    for place in range(1, TABLE):
        here = key == table[:, place, None]
        index += here * place
        listed |= here
    return index, listed


def _arrange(
    index: torch.Tensor, negative: torch.Tensor, low_byte: torch.Tensor, escapes: torch.Tensor, inputs: int
) -> torch.Tensor:
    """The planes int32 [R, C, 3, 32, 4] of weights [R, 16 * inputs]; zeros for escapes."""
    index, low_byte = index.masked_fill(escapes, 0), low_byte.masked_fill(escapes, 0)
    sign = (negative & ~escapes).to(torch.uint8)

    def ordered(t: torch.Tensor, *axes: int) -> torch.Tensor:
        t_RrgCqtehp = t.view(-1, 2, 8, inputs // MAX_INPUTS, 2, 4, 2, 2, 2)
        return t_RrgCqtehp.permute(*axes).contiguous()

    RCgtqehrp = (0, 3, 2, 5, 4, 6, 7, 1, 8)
    RCqgtehrp = (0, 3, 4, 2, 5, 6, 7, 1, 8)
    index_RCgtqehrp, sign_RCgtqehrp = ordered(index, *RCgtqehrp), ordered(sign, *RCgtqehrp)
    nibbles = index_RCgtqehrp[..., 0] | (index_RCgtqehrp[..., 1] << 4)  # by p, so that [.., (h r)] are a word's bytes
    signs_hj = sign_RCgtqehrp.flatten(-2)
    signs = (signs_hj[..., 0, :] << 7) | (signs_hj[..., 1, :] << 3)
    codes = (nibbles.flatten(-2) | signs).view(torch.int32)
    low_words = ordered(low_byte, *RCqgtehrp).flatten(-2).view(torch.int32)
    shape = (len(index), inputs // MAX_INPUTS, -1, LANES, WORDS)
    return torch.cat((codes.reshape(shape), low_words.reshape(shape)), 2)

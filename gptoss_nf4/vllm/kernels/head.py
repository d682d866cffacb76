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

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.decode import COMPILED, FOUR_PAIRS, _unpacked
from gptoss_nf4.vllm.kernels.small import _operand
from gptoss_nf4.vllm.kernels.tiles import MAX_INPUTS, ROWS
from gptoss_nf4.vllm.kernels.twelve_bits import LANES, PLANES, SHIFTS, WORDS, TwelveBits

PLANE = tl.constexpr(LANES * WORDS)  # words
TILE = tl.constexpr(LANES * WORDS * PLANES)
ESCAPES = tl.constexpr(32)  # at a time
DENSE_ROWS = 8192  # of the weight, that are unpacked at a time where cuBLAS multiplies: 47 MB of gpt-oss's head
INPUT_TILES = 4  # of a program that unpacks


class Weight(NamedTuple):
    """A `TwelveBits` as a kernel takes it."""

    words: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    places: torch.Tensor
    escapes: torch.Tensor
    unscale: float
    """By which sums of products are multiplied."""
    N: int
    """Rows."""
    K: int
    """Inputs."""
    C: int
    """Input tiles."""
    SHIFT: tl.constexpr
    """`twelve_bits.SHIFTS`."""


@dataclass(frozen=True)
class Plan:
    """How `product` runs."""

    rows: int
    """Of activations, of a program: 8, 16 or 32."""
    warps: int
    """Of a program; they share its inputs."""
    tiles: int
    """Row tiles of a program, 1 or 2."""


MAX_ROWS = 128  # of activations; beyond, a dense copy and cuBLAS are faster, part by part


def plan_product(rows: int) -> Plan | None:
    """For `rows` rows of activations; None: unpack parts of the weight, and cuBLAS."""
    if rows <= 8:
        return Plan(rows=8, warps=4, tiles=1)
    if rows <= 16:
        return Plan(rows=16, warps=4, tiles=1)
    if rows <= MAX_ROWS:
        return Plan(rows=32, warps=4, tiles=2)
    return None


# ---- starting the kernels ----


def linear(x: torch.Tensor, packed: TwelveBits, bias: torch.Tensor | None = None, plan: Plan | None = None) -> torch.Tensor:
    """A linear layer.

    Waits for nothing and looks at no value, so it may be captured in a CUDA graph.

    Args:
        x: [rows, in] in the weight's dtype.
        packed: the weight [out, in].
        bias: [out] in the weight's dtype, or None.
        plan: in place of what `plan_product` chooses.

    Returns:
        [rows, out] in the weight's dtype.
    """
    rows, inputs = x.shape
    if x.dtype != packed.dtype or inputs != packed.inputs:
        raise TypeError(f"x of {x.dtype} [{rows}, {inputs}], expected {packed.dtype} [rows, {packed.inputs}]")
    out = torch.empty(rows, packed.rows, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    plan = plan or plan_product(rows)
    if plan is None:
        linear_in_parts(x, packed, out)
    else:
        blocks, row_tiles = triton.cdiv(rows, plan.rows), len(packed.table)
        grid = (blocks * triton.cdiv(row_tiles, plan.tiles),)
        options = {"BM": plan.rows, "WARPS": plan.warps, "TWO": plan.tiles == 2, "num_warps": plan.warps}
        product[grid](x.contiguous(), kernel_weight(packed), out, rows, blocks, row_tiles, **options)
    return out if bias is None else out.add_(bias)


def linear_in_parts(x: torch.Tensor, packed: TwelveBits, out: torch.Tensor) -> None:
    """out [rows, out_features] = x times the weight, of which `DENSE_ROWS` rows are dense at a time."""
    part = torch.empty(min(DENSE_ROWS, len(packed.table) * ROWS), packed.inputs, dtype=x.dtype, device=x.device)
    for first in range(0, packed.rows, DENSE_ROWS):
        rows = min(DENSE_ROWS, packed.rows - first)
        _dequantize_rows(packed, first, part[:rows])
        torch.mm(x, part[:rows].t(), out=out[:, first : first + rows])


def dequantize(packed: TwelveBits, first: int = 0, rows: int | None = None) -> torch.Tensor:
    """The dense weight, or `rows` of its rows from row `first` on, a multiple of 16: bit for bit what was packed."""
    rows = packed.rows - first if rows is None else rows
    out = torch.empty(rows, packed.inputs, dtype=packed.dtype, device=packed.words.device)
    _dequantize_rows(packed, first, out)
    return out


def _dequantize_rows(packed: TwelveBits, first: int, out: torch.Tensor) -> None:
    weight, tile = kernel_weight(packed), first // ROWS
    scaled = packed.scale != 1
    row_tiles = triton.cdiv(len(out), ROWS)
    grid = (row_tiles, triton.cdiv(weight.C, INPUT_TILES))
    unpack[grid](weight, out, tile, len(out), TILES=INPUT_TILES, SCALED=scaled, num_warps=4)
    unpack_escapes[(row_tiles,)](weight, out, tile, len(out), SCALED=scaled, num_warps=1)


def kernel_weight(packed: TwelveBits) -> Weight:
    """`packed` as the kernels take it."""
    return Weight(
        words=packed.words,
        table=packed.table,
        starts=packed.starts,
        places=packed.places,
        escapes=packed.escapes,
        unscale=1 / packed.scale,
        N=packed.rows,
        K=packed.inputs,
        C=packed.inputs // MAX_INPUTS,
        SHIFT=tl.constexpr(SHIFTS[packed.dtype]),
    )


# ---- the kernels ----


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
    # The first escapes, and what each table is, come while the products run.
    listed = _escapes_from(weight, tile, tl.load(weight.starts + tile))
    if TWO:
        next_listed = _escapes_from(weight, next_tile, tl.load(weight.starts + next_tile))
    table = _load_table(weight, tile)
    next_table = _load_table(weight, next_tile)
    sum_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    next_sum_wnm = tl.zeros([WARPS, 16, BM], tl.float32)
    for start in tl.range(0, weight.C, WARPS, num_stages=1):
        codes_wls, low_qwlj, next_codes_wls, next_low_qwlj, x_qMwmk = ahead
        x_wkm = _operand(x_qMwmk)
        ahead = _load(x, words, next_words, row_m, weight, start + WARPS + warp, TWO)
        sum_wnm += tl.dot(_weight(codes_wls, low_qwlj, table, weight.SHIFT, x.dtype.element_ty), x_wkm)
        if TWO:
            next_wnk = _weight(next_codes_wls, next_low_qwlj, next_table, weight.SHIFT, x.dtype.element_ty)
            next_sum_wnm += tl.dot(next_wnk, x_wkm)
    sum_nm = _with_escapes(tl.sum(sum_wnm, axis=0), listed, x, weight, tile, row_m)
    _store(out, sum_nm * weight.unscale, row_m, tile, weight.N)
    if TWO:
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


# ---- decoding ----


def _expand(shift: int) -> str:
    """PTX that decodes a word of nibbles and two of low bytes.

    Outputs: $0 .. $3 the pairs of weights (h, r) = (0, 0), (0, 1), (1, 0) and (1, 1), the first in the low half.
    Inputs: $4 the word, $5 and $6 low bytes of h = 0 and 1, $7 and $8 the table.
    """
    sign_mask = f"0x{0x80808080 >> shift:08x}"
    first_sign = "$4"  # the signs of h = 0 stand where bfloat16 wants them, at the top of each byte
    lines = ["{ .reg .b32 code, key, sign;", "and.b32 code, $4, 0x77777777;"]
    if shift:
        lines.append(f"shr.u32 sign, $4, {shift};")
        first_sign = "sign"
    for h, sign in ((0, first_sign), (1, "sign")):
        if h:
            lines += ["shr.u32 code, code, 16;", f"shl.b32 sign, $4, {4 - shift};"]
        lines += [
            "prmt.b32 key, $7, $8, code;",
            f"lop3.b32 key, key, {sign}, {sign_mask}, 0xf8;",  # key | (sign & mask)
            f"prmt.b32 ${2 * h}, ${5 + h}, key, 0x5140;",
            f"prmt.b32 ${2 * h + 1}, ${5 + h}, key, 0x7362;",
        ]
    if shift:
        lines += [f"shl.b32 ${pair}, ${pair}, {shift};" for pair in range(4)]  # a half's three upper bits are 0
    return "\n".join(lines) + "}"


EXPAND = tl.constexpr(_expand(0))
EXPAND_SHIFTED = tl.constexpr(_expand(3))
EXPAND_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")


@triton.jit
def decode(codes_wls, low_qwlj, table, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Planes of a tile, int32 [w, l, s] and [q, w, l, j = (e h)] -> `dtype` [w, l, s, p, r, h]."""
    W: tl.constexpr = codes_wls.shape[0]
    low_wlqeh = tl.permute(tl.reshape(low_qwlj, [2, W, 32, 2, 2]), [1, 2, 0, 3, 4])
    low0_wls, low1_wls = tl.split(tl.reshape(low_wlqeh, [W, 32, 4, 2]))
    if COMPILED:
        pairs = tl.inline_asm_elementwise(
            EXPAND_SHIFTED if SHIFT else EXPAND,
            EXPAND_CONSTRAINTS,
            [codes_wls, low0_wls, low1_wls, table[0], table[1]],
            dtype=FOUR_PAIRS,
            is_pure=True,
            pack=1,
        )
    else:
        pairs = (
            _pair_plainly(codes_wls, low0_wls, table, 0, 0, SHIFT),
            _pair_plainly(codes_wls, low0_wls, table, 0, 1, SHIFT),
            _pair_plainly(codes_wls, low1_wls, table, 1, 0, SHIFT),
            _pair_plainly(codes_wls, low1_wls, table, 1, 1, SHIFT),
        )
    return _unpacked(pairs, dtype)


@triton.jit
def _pair_plainly(codes, low, table, h: tl.constexpr, r: tl.constexpr, SHIFT: tl.constexpr):
    """What `_expand` computes, for the interpreter: the pair of weights (h, r), uint32."""
    pair = tl.zeros(codes.shape, tl.int32)
    for p in tl.static_range(2):
        j = 2 * r + p
        index = (codes >> (4 * (4 * h + j))) & 7
        key = tl.where(index < 4, table[0] >> (8 * (index & 3)), table[1] >> (8 * (index & 3))) & 255
        sign = (codes >> (8 * j + 7 - 4 * h)) & 1
        half = (((key << 8) | ((low >> (8 * j)) & 255)) << SHIFT) | (sign << 15)
        pair |= half << (16 * p)
    return pair.to(tl.uint32, bitcast=True)

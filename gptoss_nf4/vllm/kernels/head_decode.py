"""Decoding of weights in 12 bits on the device, by byte permutes; `twelve_bits` has the format.

Triton's interpreter knows no inline assembly. There the same is done in plain Triton.
"""

import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.decode import COMPILED, FOUR_PAIRS, _unpacked


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

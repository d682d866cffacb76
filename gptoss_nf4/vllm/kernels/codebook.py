"""Decoding 4-bit codes in registers: eight weights of a word by byte permutes.

The 16 values of the codebook, in float16 or bfloat16, stand in eight registers: four with their low bytes, four with
their high ones. PTX `prmt` picks four bytes out of two registers by four 4-bit selectors, and the codes are such
selectors already: two picks by the low three bits of each code, one from each half of the plane, a third permute that
chooses between the two by the codes' top bits, and two that zip low and high bytes into pairs of 16-bit weights. That
is 18 integer instructions and three products for eight weights, and no memory access (a select tree takes about 150, a
table in memory eight gathers).

Where a multiprocessor has the shared memory for it (`launch.SHARED_LIMIT`), decode kernels use a table of pairs instead: a
byte of codes is a row, and a lane reads its own column. That is three instructions for two weights.

Rounding the codebook to 16 bit is the kernels' largest error, and a systematic one: the same 16 values are wrong
everywhere. So the codebook is multiplied by the factor in [1, 2) at which its rounding error is smallest, and the
kernels divide their sums by it: bfloat16's relative error falls from 1.06e-3 to 0.63e-3, float16's from 1.6e-4 to
0.65e-4.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from gptoss_nf4.format.codec import CODEBOOKS

CANDIDATES = 8192  # factors tried in [1, 2)
SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True)
class Codebook:
    """`table`: int32 [11, 32] on the GPU. Ten rows once for each lane: the low bytes of the 16 values times `factor` in
    four, their high bytes in four, and the factors 2^31 and 2^16; then the 16 values themselves."""

    table: torch.Tensor
    factor: float


def _rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float64 `values` with significands of `bits` bits, rounded to nearest even."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(fraction, bits)), exponent - bits)


def best_factor(quant_type: str, bits: int) -> float:
    """The factor in [1, 2) that makes the mean squared error of the codebook rounded to `bits` bits smallest."""
    values = CODEBOOKS[quant_type].astype(np.float64)
    factors = 1 + np.arange(CANDIDATES) / CANDIDATES
    scaled = values * factors[:, None]
    errors = np.square((_rounded(scaled, bits) - scaled) / factors[:, None]).sum(axis=1)
    return float(factors[errors.argmin()])


@cache
def codebook(quant_type: str, dtype: torch.dtype, device: torch.device) -> Codebook:
    """The table of `quant_type` for weights in `dtype` (float16 or bfloat16)."""
    factor = best_factor(quant_type, SIGNIFICAND_BITS[dtype])
    values = torch.from_numpy(CODEBOOKS[quant_type].astype(np.float64) * factor).to(dtype)
    planes = values.view(torch.uint8).view(16, 2).t().contiguous().view(torch.int32).flatten()
    rows = torch.cat((planes, torch.tensor([-(1 << 31), 1 << 16], dtype=torch.int32)))[:, None].repeat(1, 32)
    bits = torch.nn.functional.pad(values.view(torch.int16).to(torch.int32) & 0xFFFF, (0, 16))[None]
    return Codebook(torch.cat((rows, bits)).to(device), factor)


def _decode_asm(scale_type: str | None = None) -> str:
    """PTX for one word: outputs $0..$3 are the pairs of nibbles (0, 1) to (6, 7).

    Inputs are $4 the word, $5..$14 the table and, where `scale_type` names a packed type, $15 and $16 the pairs by which
    the weights of rows g and g + 8 are multiplied.
    """
    lines = [
        "{ .reg .b32 code, half, low, high, a, b, none, zero; .reg .b64 wide;",
        # Shifts as products: the multiplier stands idle where the integer unit limits the kernels.
        "mul.wide.u32 wide, $4, $13;",
        "mov.b64 {none, half}, wide;",
        "and.b32 code, $4, 0x77777777;",
        # Selector that takes byte i of `a`, or of `b` (numbered 4 + i) where code i has its top bit set.
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;",  # (half & 0x44444444) | 0x32103210
    ]
    for first in (0, 2):
        for plane, table in (("low", 5), ("high", 9)):
            lines += [
                f"prmt.b32 a, ${table}, ${table + 1}, code;",
                f"prmt.b32 b, ${table + 2}, ${table + 3}, code;",
                f"prmt.b32 {plane}, a, b, half;",
            ]
        lines += [f"prmt.b32 ${first}, low, high, 0x5140;", f"prmt.b32 ${first + 1}, low, high, 0x7362;"]
        if first == 0:
            for register in ("code", "half"):
                lines += [f"mul.wide.u32 wide, {register}, $14;", f"mov.b64 {{none, {register}}}, wide;"]
    if scale_type:  # as x * y + (-0): Ampere has no product of bfloat16 pairs
        lines.append("mov.b32 zero, 0x80008000;")
        lines += [f"fma.rn.{scale_type} ${pair}, ${pair}, ${15 + pair % 2}, zero;" for pair in range(4)]
    return "\n".join(lines) + "}"


DECODE_ASM = tl.constexpr(_decode_asm())
DECODE_CONSTRAINTS = tl.constexpr("=&r," * 4 + "r," * 10 + "r")
SCALED_ASM_BF16 = tl.constexpr(_decode_asm("bf16x2"))
SCALED_ASM_FP16 = tl.constexpr(_decode_asm("f16x2"))
SCALED_CONSTRAINTS = tl.constexpr("=&r," * 4 + "r," * 12 + "r")


@triton.jit
def load_table(table):
    """The table's ten registers, [1, 32, 1] each.

    Every lane loads a copy of its own. From constants, or from one copy, the compiler would make values that are the
    same in all lanes, keep them elsewhere and copy them into a register for each permute.
    """
    lane = tl.arange(0, 32)[None, :, None]
    return (
        tl.load(table + lane), tl.load(table + 32 + lane), tl.load(table + 64 + lane), tl.load(table + 96 + lane),
        tl.load(table + 128 + lane), tl.load(table + 160 + lane), tl.load(table + 192 + lane), tl.load(table + 224 + lane),
        tl.load(table + 256 + lane), tl.load(table + 288 + lane),
    )  # fmt: skip


@triton.jit
def _nibble(word, table, number: tl.constexpr, dtype: tl.constexpr):
    """One weight of a word in plain Triton, for the interpreter, which has no inline assembly."""
    code = (word >> (4 * number)) & 15
    shift = (code & 3) * 8
    low = (tl.load(table + (code >> 2) * 32) >> shift) & 255
    high = (tl.load(table + 128 + (code >> 2) * 32) >> shift) & 255
    return (low | (high << 8)).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _nibbles(word, table, dtype: tl.constexpr):
    return (
        _nibble(word, table, 0, dtype), _nibble(word, table, 1, dtype),
        _nibble(word, table, 2, dtype), _nibble(word, table, 3, dtype),
        _nibble(word, table, 4, dtype), _nibble(word, table, 5, dtype),
        _nibble(word, table, 6, dtype), _nibble(word, table, 7, dtype),
    )  # fmt: skip


@triton.jit
def _low(pair, dtype: tl.constexpr):
    return pair.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _high(pair, dtype: tl.constexpr):
    return (pair >> 16).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _joined(p0, p1, p2, p3, dtype: tl.constexpr):
    low = tl.join(tl.join(_low(p0, dtype), _high(p0, dtype)), tl.join(_low(p1, dtype), _high(p1, dtype)))
    high = tl.join(tl.join(_low(p2, dtype), _high(p2, dtype)), tl.join(_low(p3, dtype), _high(p3, dtype)))
    return tl.join(low, high)


@triton.jit
def _joined_nibbles(n0, n1, n2, n3, n4, n5, n6, n7):
    return tl.join(tl.join(tl.join(n0, n1), tl.join(n2, n3)), tl.join(tl.join(n4, n5), tl.join(n6, n7)))


@triton.jit
def decode(word, table, registers, dtype: tl.constexpr, ASM: tl.constexpr):
    """int32 words [...] -> `dtype` weights [..., 2, 2, 2]; the last indexes are bits 0, 1 and 2 of a nibble's number."""
    if ASM:
        t0, t1, t2, t3, t4, t5, t6, t7, t8, t9 = registers
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            DECODE_ASM, DECODE_CONSTRAINTS, [word, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
        return _joined(p0, p1, p2, p3, dtype)
    n0, n1, n2, n3, n4, n5, n6, n7 = _nibbles(word, table, dtype)
    return _joined_nibbles(n0, n1, n2, n3, n4, n5, n6, n7)


SHARED_BYTES = 256 * 32 * 4
DECLARE_ASM = tl.constexpr(f".shared .align 16 .b8 nf4_pairs[{SHARED_BYTES}];\nmov.u32 $0, nf4_pairs;")
STORE_ASM = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, 0;")


def _lookup_asm() -> str:
    lines = ["{ .reg .b32 a;"]
    for byte in range(4):
        lines += [f"prmt.b32 a, $4, 0, 0x444{byte};", "mad.lo.u32 a, a, 128, $5;", f"ld.shared.b32 ${byte}, [a];"]
    return "\n".join(lines) + "}"


LOOKUP_ASM = tl.constexpr(_lookup_asm())
LOOKUP_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r")


@triton.jit
def fill_shared(table, ASM: tl.constexpr):
    """Write the table of `lookup` into shared memory; returns where each lane's column of it begins, int32 [1, 32, 1].

    256 rows, one for each byte of codes, with its pair of 16-bit weights once for every lane: lanes never meet in a bank.
    """
    column = tl.arange(0, 32)[None, :, None] * 4
    if ASM:
        code = tl.arange(0, 16)
        first, second = code[None, :, None], code[:, None, None]
        pair = tl.load(table + 320 + first) | (tl.load(table + 320 + second) << 16)
        base = tl.inline_asm_elementwise(DECLARE_ASM, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        place = base + (second * 16 + first) * 128 + tl.arange(0, 8)[None, None, :] * 16
        tl.inline_asm_elementwise(STORE_ASM, "=r,r,r", [place, pair], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        base = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1)
        column += base
    return column


@triton.jit
def lookup(word, table, column, dtype: tl.constexpr, ASM: tl.constexpr):
    """`decode` by the table in shared memory: half a load and a little arithmetic a weight, none of it permutes."""
    if not ASM:
        n0, n1, n2, n3, n4, n5, n6, n7 = _nibbles(word, table, dtype)
        return _joined_nibbles(n0, n1, n2, n3, n4, n5, n6, n7)
    p0, p1, p2, p3 = tl.inline_asm_elementwise(
        LOOKUP_ASM,
        LOOKUP_CONSTRAINTS,
        [word, column],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )
    return _joined(p0, p1, p2, p3, dtype)


@triton.jit
def decode_scaled(word, scale0, scale1, registers, dtype: tl.constexpr):
    """`decode` in assembly, times a scale for each of the word's two rows.

    scale0, scale1: float32, for rows g and g + 8 (bit 1 of the nibble's number), broadcast to `word`; rounded to
    `dtype` first.
    """
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9 = registers
    pair0 = scale0.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001
    pair1 = scale1.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001
    if dtype == tl.bfloat16:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            SCALED_ASM_BF16, SCALED_CONSTRAINTS, [word, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, pair0, pair1],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            SCALED_ASM_FP16, SCALED_CONSTRAINTS, [word, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, pair0, pair1],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    return _joined(p0, p1, p2, p3, dtype)


@triton.jit
def halves(pair):
    """The two float16 in int32 `pair`, low bits first."""
    low = pair.to(tl.uint16).to(tl.float16, bitcast=True)
    return low, (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)

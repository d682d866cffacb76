"""Decoding 4-bit codes on the device. The module `codebook` has the contract of the functions here.

`decode` works in registers. The 16 values stand in eight of them: four with low bytes, four with high bytes. PTX `prmt`
picks four bytes out of two registers by four selectors of 4 bits, and codes are such selectors already. One permute
picks by the low three bits of four codes from the first eight values, a second one from the last eight, and a third one
chooses between the two by the codes' top bits. This is done for the low and for the high bytes, and two more permutes
join them to pairs of weights. So eight weights take 18 integer instructions and three products, and no memory access. A
tree of selects would take about 150 instructions, a table in memory eight gathers.

`lookup` works with a table in shared memory: 256 pairs of weights, one for every byte, since a byte is two codes. Every
lane has a column of its own, so that lanes never meet in a bank. Two weights take three instructions, and the table
takes 32 KiB.

Triton's interpreter knows no inline assembly. There `decode` does the same in plain Triton, and the others do not work.
"""

import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


# ---- decode: byte permutes ----


def _permutes(scale_type: str | None = None) -> str:
    """PTX that decodes one word.

    Outputs: $0 .. $3 the pairs of weights of nibbles (0, 1), (2, 3), (4, 5) and (6, 7), the first in the low half.
    Inputs: $4 the word, $5 .. $14 rows 0 to 9 of the table. If `scale_type` names a packed type of PTX, also $15 and
    $16: the pairs by which the weights of rows g and g + 8 are multiplied.
    """
    lines = [
        "{ .reg .b32 code, half, low, high, a, b, none, zero; .reg .b64 wide;",
        # half = word >> 1. Shifts are products: the integer unit limits the kernels, the multiplier stands idle.
        "mul.wide.u32 wide, $4, $13;",
        "mov.b64 {none, half}, wide;",
        "and.b32 code, $4, 0x77777777;",
        # half = (half & 0x44444444) | 0x32103210. It selects byte i of a, or of b if code i has its top bit set.
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;",
    ]
    for pair in (0, 2):
        for plane, table in (("low", 5), ("high", 9)):
            lines += [
                f"prmt.b32 a, ${table}, ${table + 1}, code;",
                f"prmt.b32 b, ${table + 2}, ${table + 3}, code;",
                f"prmt.b32 {plane}, a, b, half;",
            ]
        lines += [f"prmt.b32 ${pair}, low, high, 0x5140;", f"prmt.b32 ${pair + 1}, low, high, 0x7362;"]
        if pair == 0:  # on to the upper four codes: both selectors >> 16
            for register in ("code", "half"):
                lines += [f"mul.wide.u32 wide, {register}, $14;", f"mov.b64 {{none, {register}}}, wide;"]
    if scale_type:  # as x * y + (-0), since Ampere has no product of bfloat16 pairs
        lines.append("mov.b32 zero, 0x80008000;")
        lines += [f"fma.rn.{scale_type} ${pair}, ${pair}, ${15 + pair % 2}, zero;" for pair in range(4)]
    return "\n".join(lines) + "}"


PERMUTES = tl.constexpr(_permutes())
PERMUTES_CONSTRAINTS = tl.constexpr("=&r," * 4 + "r," * 10 + "r")
SCALED_PERMUTES_BF16 = tl.constexpr(_permutes("bf16x2"))
SCALED_PERMUTES_FP16 = tl.constexpr(_permutes("f16x2"))
SCALED_PERMUTES_CONSTRAINTS = tl.constexpr("=&r," * 4 + "r," * 12 + "r")
FOUR_PAIRS = tl.constexpr((tl.uint32, tl.uint32, tl.uint32, tl.uint32))


@triton.jit
def load_table(table):
    """What `decode` needs of the table: rows 0 to 9 in ten registers, int32 [1, 32, 1]. (Interpreted: the table.)

    Every lane loads a copy of its own. If the compiler knew that a value is the same in all lanes, it would keep it in
    a uniform register and copy it for each permute.
    """
    registers = ()
    lane = tl.arange(0, 32)[None, :, None]
    for row in tl.static_range(10):
        registers += (tl.load(table + 32 * row + lane),)
    return registers if COMPILED else table


@triton.jit
def decode(word, registers, dtype: tl.constexpr):
    """int32 words [w, l, s] -> `dtype` [w, l, s, p, r, h]; `registers` from `load_table`."""
    return _unpacked(_decode_pairs(word, registers), dtype) if COMPILED else _decode_plainly(word, registers, dtype)


@triton.jit
def _decode_pairs(word, registers):
    """`decode`, as four uint32 [w, l, s]: see `_unpacked`."""
    operands = (word,)
    operands += registers
    return tl.inline_asm_elementwise(PERMUTES, PERMUTES_CONSTRAINTS, operands, dtype=FOUR_PAIRS, is_pure=True, pack=1)


@triton.jit
def decode_scaled(word, absmax0, absmax1, registers, dtype: tl.constexpr):
    """`decode`, times absmax. Not for the interpreter.

    absmax0, absmax1: float16 of rows g and g + 8 (r = 0 and 1), broadcast to `word`.
    """
    operands = (word,)
    operands += registers
    operands += (_twice(absmax0, dtype), _twice(absmax1, dtype))
    pairs = tl.inline_asm_elementwise(
        SCALED_PERMUTES_BF16 if dtype == tl.bfloat16 else SCALED_PERMUTES_FP16,
        SCALED_PERMUTES_CONSTRAINTS,
        operands,
        dtype=FOUR_PAIRS,
        is_pure=True,
        pack=1,
    )
    return _unpacked(pairs, dtype)


# ---- lookup: a table of pairs in shared memory ----

PAIRS_BYTES = 256 * 32 * 4  # bytes of codes, lanes, bytes of a pair of weights
DECLARE_PAIRS = tl.constexpr(f".shared .align 16 .b8 nf4_pairs[{PAIRS_BYTES}];\nmov.u32 $0, nf4_pairs;")
STORE_FOUR_TIMES = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, 0;")


def _lookups(scale_type: str | None = None) -> str:
    """PTX that decodes one word.

    Outputs: $0 .. $3 the pairs of weights. Inputs: $4 the word, $5 the lane's column. If `scale_type`, also $6 and $7,
    which are $15 and $16 of `_permutes`.
    """
    lines = ["{ .reg .b32 a, zero;"]
    for byte in range(4):
        lines += [f"prmt.b32 a, $4, 0, 0x444{byte};", "mad.lo.u32 a, a, 128, $5;", f"ld.shared.b32 ${byte}, [a];"]
    if scale_type:
        lines.append("mov.b32 zero, 0x80008000;")
        lines += [f"fma.rn.{scale_type} ${pair}, ${pair}, ${6 + pair % 2}, zero;" for pair in range(4)]
    return "\n".join(lines) + "}"


LOOKUPS = tl.constexpr(_lookups())
LOOKUPS_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r")
SCALED_LOOKUPS_BF16 = tl.constexpr(_lookups("bf16x2"))
SCALED_LOOKUPS_FP16 = tl.constexpr(_lookups("f16x2"))
SCALED_LOOKUPS_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r")


@triton.jit
def fill_shared(table):
    """Fill the table of `lookup`. Gives the address of each lane's column, int32 [1, 32, 1]. Not for the interpreter.

    The pair of byte b stands at 128 b, 32 times.
    """
    code = tl.arange(0, 16)
    low, high = code[None, :, None], code[:, None, None]
    pair = tl.load(table + 320 + low) | (tl.load(table + 320 + high) << 16)
    base = tl.inline_asm_elementwise(DECLARE_PAIRS, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    place = base + (high * 16 + low) * 128 + tl.arange(0, 8)[None, None, :] * 16
    tl.inline_asm_elementwise(STORE_FOUR_TIMES, "=r,r,r", [place, pair], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    # An address that exists only behind the barrier: no lookup, which the compiler takes for pure, can move before it.
    base = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1)
    return base + tl.arange(0, 32)[None, :, None] * 4


@triton.jit
def lookup(word, column, dtype: tl.constexpr):
    """int32 words [w, l, s] -> `dtype` [w, l, s, p, r, h]; `column` from `fill_shared`. Not for the interpreter."""
    return _unpacked(_lookup_pairs(word, column), dtype)


@triton.jit
def _lookup_pairs(word, column):
    """`lookup`, as four uint32 [w, l, s]: see `_unpacked`."""
    return tl.inline_asm_elementwise(LOOKUPS, LOOKUPS_CONSTRAINTS, [word, column], dtype=FOUR_PAIRS, is_pure=True, pack=1)


@triton.jit
def lookup_scaled(word, absmax0, absmax1, column, dtype: tl.constexpr):
    """`lookup`, times absmax, as `decode_scaled`. Not for the interpreter."""
    pairs = tl.inline_asm_elementwise(
        SCALED_LOOKUPS_BF16 if dtype == tl.bfloat16 else SCALED_LOOKUPS_FP16,
        SCALED_LOOKUPS_CONSTRAINTS,
        [word, column, _twice(absmax0, dtype), _twice(absmax1, dtype)],
        dtype=FOUR_PAIRS,
        is_pure=True,
        pack=1,
    )
    return _unpacked(pairs, dtype)


# ---- absmax of blocks along the outputs: one for each input ----


# As x * y + (-0), see `_permutes`.
TIMES_BF16 = tl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }")
TIMES_FP16 = tl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.f16x2 $0, $1, $2, zero; }")


@triton.jit
def times(values, absmax):
    """`values` times `absmax`, which broadcast, both in one dtype of 16 bits, rounded to it: two in an instruction."""
    dtype: tl.constexpr = values.dtype
    if COMPILED:
        text: tl.constexpr = TIMES_BF16 if dtype == tl.bfloat16 else TIMES_FP16
        product = tl.inline_asm_elementwise(text, "=r,r,r", [values, absmax], dtype=values.dtype, is_pure=True, pack=2)
    else:
        product = (values.to(tl.float32) * absmax.to(tl.float32)).to(dtype)
    return product


@triton.jit
def decode_times(word, absmax0, absmax1, decoder, dtype: tl.constexpr, SHARED_TABLE: tl.constexpr):
    """`lookup` if SHARED_TABLE, else `decode`, times absmax of each input.

    absmax0, absmax1: int32 [w, l, s], each a pair (p) in `dtype`, of the inputs with h = 0 and 1.
    """
    if COMPILED:
        h0r0, h0r1, h1r0, h1r1 = _lookup_pairs(word, decoder) if SHARED_TABLE else _decode_pairs(word, decoder)
        pairs = (
            _times_pair(h0r0, absmax0, dtype),
            _times_pair(h0r1, absmax0, dtype),
            _times_pair(h1r0, absmax1, dtype),
            _times_pair(h1r1, absmax1, dtype),
        )
        weight = _unpacked(pairs, dtype)
    else:
        absmax_wlsph = tl.join(_split(absmax0, dtype), _split(absmax1, dtype))
        weight = times(_decode_plainly(word, decoder, dtype), tl.expand_dims(absmax_wlsph, 4))
    return weight


@triton.jit
def _times_pair(pair, absmax, dtype: tl.constexpr):
    """uint32 [w, l, s] times int32 [w, l, s], both pairs of `dtype`."""
    text: tl.constexpr = TIMES_BF16 if dtype == tl.bfloat16 else TIMES_FP16
    return tl.inline_asm_elementwise(text, "=r,r,r", [pair, absmax], dtype=tl.uint32, is_pure=True, pack=1)


# ---- what they share ----


@triton.jit
def _twice(absmax, dtype: tl.constexpr):
    """absmax in `dtype`, twice in a register, for the two weights of a pair: uint32."""
    return absmax.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) * 0x10001


@triton.jit
def halves(pair):
    """The two float16 in an int32, the one in the low bits first; both of the shape of `pair`."""
    low = pair.to(tl.uint16).to(tl.float16, bitcast=True)
    return low, (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _unpacked(pairs, dtype: tl.constexpr):
    """Four uint32 [w, l, s], the pairs (h, r) = (0, 0), (0, 1), (1, 0), (1, 1) -> `dtype` [w, l, s, p, r, h]."""
    h0r0, h0r1, h1r0, h1r1 = pairs
    h0 = tl.join(_split(h0r0, dtype), _split(h0r1, dtype))
    h1 = tl.join(_split(h1r0, dtype), _split(h1r1, dtype))
    return tl.join(h0, h1)


@triton.jit
def _split(pair, dtype: tl.constexpr):
    """uint32 [...] -> `dtype` [..., p], the low half first."""
    low = pair.to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(low, (pair >> 16).to(tl.uint16).to(dtype, bitcast=True))


@triton.jit
def _decode_plainly(word, table, dtype: tl.constexpr):
    """`decode` for the interpreter."""
    prh = tl.arange(0, 8)
    nibble = (prh & 1) * 4 + (prh & 2) + (prh >> 2)  # 4h + 2r + p
    code = (word[:, :, :, None] >> (4 * nibble)) & 15
    shift = (code & 3) * 8
    low = (tl.load(table + (code >> 2) * 32) >> shift) & 255
    high = (tl.load(table + 128 + (code >> 2) * 32) >> shift) & 255
    weight = (low | (high << 8)).to(tl.uint16).to(dtype, bitcast=True)
    return tl.reshape(weight, [word.shape[0], word.shape[1], word.shape[2], 2, 2, 2])

"""The emulator of PTX itself, by the definitions of its instructions."""

from bisect import bisect_left
from fractions import Fraction

import numpy as np
import ptx
import pytest


def test_prmt_by_the_definition():
    random = np.random.default_rng(2)
    a, b, selectors = random.integers(0, 1 << 32, (3, 4096), dtype=np.uint32)
    (found,) = ptx.run("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selectors])
    for one, other, selector, result in zip(a.tolist(), b.tolist(), selectors.tolist(), found.tolist(), strict=True):
        bytes_of = one.to_bytes(4, "little") + other.to_bytes(4, "little")
        picked = []
        for place in range(4):
            nibble = selector >> 4 * place & 15
            byte = bytes_of[nibble & 7]
            picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        assert result == int.from_bytes(bytes(picked), "little")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_fma_is_the_exact_result_rounded_once(kind):
    """Against fractions, and the nearest of all numbers of the format; half of the cases lie near a tie."""
    random = np.random.default_rng(3)
    patterns = np.arange(1 << 15, dtype=np.uint32)
    with np.errstate(invalid="ignore"):  # NaN
        positive = ptx.halves_to_float64(patterns, kind)[:, 0]
    finite = [Fraction(each) for each in positive[np.isfinite(positive)].tolist()]
    a, b, c = random.integers(0, 1 << 16, (3, 3000), dtype=np.uint32)
    b[::2] = b[::2] & 0x8F00 | 0x3800  # products of few bits: ties, and small c beside them
    c[::4] &= 0x800F
    (found,) = ptx.run(f"fma.rn.{kind}x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c])
    with np.errstate(invalid="ignore"):
        values = [ptx.halves_to_float64(each, kind)[:, 0] for each in (a, b, c)]
    checked = 0
    for x, y, z, result in zip(*values, (found & 0xFFFF).tolist(), strict=True):
        if not np.isfinite([x, y, z]).all():
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if exact == 0 or abs(exact) >= finite[-1]:
            continue
        place = bisect_left(finite, abs(exact))
        below, above = finite[max(place - 1, 0)], finite[place]
        nearer = place if abs(exact) - below > above - abs(exact) or (exact and below == above) else place - 1
        if abs(exact) - below == above - abs(exact):
            nearer = place if place % 2 == 0 else place - 1
        assert result == nearer | (0x8000 if exact < 0 else 0), (x, y, z)
        checked += 1
    assert checked > 1500


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("lop3.b32 $0, $1, 0x0f0f0f0f, 0x00ff00ff, 0x96;", 0x12345678, 0x12345678 ^ 0x0F0F0F0F ^ 0x00FF00FF),
        ("shf.l.wrap.b32 $0, $1, 0xabcdef01, 36;", 0x12345678, 0xBCDEF011),
        ("shf.r.clamp.b32 $0, $1, 0xabcdef01, 40;", 0x12345678, 0xABCDEF01),
        ("shr.s32 $0, $1, 99;", 0x80000000, 0xFFFFFFFF),
        ("shl.b32 $0, $1, 32;", 0x80000001, 0),
        ("bfe.u32 $0, $1, 4, 8;", 0x12345678, 0x67),
        ("mul.hi.u32 $0, $1, 0x10000;", 0x12345678, 0x1234),
        ("sub.u32 $0, $1, 1;", 0, 0xFFFFFFFF),
        ("add.s32 $0, $1, -1;", 5, 4),
        ("{ .reg .b64 w; mul.wide.u32 w, $1, 0x10000; .reg .b32 l; mov.b64 {l, $0}, w; }", 0x12345678, 0x1234),
        ("{ .reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {h, l}; }", 0x12345678, 0x56781234),
        ("{ .reg .pred p; setp.lt.s32 p, $1, 0; selp.b32 $0, 7, 9, p; }", 0x80000000, 7),
        ("{ .reg .pred p; mov.b32 $0, 3; setp.lt.u32 p, $1, 1; @p mov.b32 $0, 4; }", 0x80000000, 3),
        ("{ .reg .pred p; setp.ne.b32 p, $1, 0; mov.b32 $0, 4; @p mov.b32 $0, 3; @!p mov.b32 $0, 2; }", 5, 3),
        ("{ .reg .b64 a; mov.b64 a, 0; prefetch.global.L2 [a]; mov.b32 $0, $1; }", 5, 5),
        ("cvt.rn.f16x2.f32 $0, 0x3f800000, $1;", 0x40000000, 0x3C004000),
        ("cvt.rn.bf16x2.f32 $0, 0x3f808000, $1;", 0x40008001, 0x3F804001),
    ],
)
def test_instructions_by_hand(text, value, expected):
    (found,) = ptx.run(text, "=&r,r", [np.array([value], np.uint32)])
    assert hex(found.item()) == hex(expected)


@pytest.mark.parametrize(
    ("text", "constraints", "message"),
    [
        ("vote.b32 $0, $1;", "=r,r", "unknown instruction"),
        ("prmt.b32.f4e $0, $1, $1, 0;", "=r,r", "unknown instruction"),
        ("and.b32 $0, $1;", "=r,r", "2 operands|1 operands"),
        ("and.b32 $0, $1, other;", "=r,r", "no register other"),
        ("{ .reg .b32 a; and.b32 $0, $1, a; }", "=r,r", "a is not set"),
        ("{ .reg .b64 a; and.b32 a, $1, 1; }", "=r,r", "64 bits, expected 32"),
        ("and.b32 $0, $1, 0x100000000;", "=r,r", "has no 32 bits"),
        ("and.b32 $1, $1, 1;", "=r,r", "is an input"),
        ("mov.b32 $0, 1; and.b32 $0, $1, 1;", "=r,r", "has no &"),
        ("and.b32 $0, $1, 1", "=r,r", "no semicolon"),
        ("{ mov.b32 $0, $1;", "=r,r", "without }"),
        ("", "=r,r", "is not set"),
        (".global .b32 x; mov.b32 $0, $1;", "=r,r", "not understood"),
        (".shared .align 16 .b8 t[65536]; mov.b32 $0, t;", "=r,r", "at most"),
        (".shared .align 16 .b8 t[64]; { .reg .b32 a; mov.b32 a, t; ld.shared.b32 $0, [a]; }", "=r,r", "not stored"),
        (".shared .align 4 .b8 t[8]; { .reg .b32 a; mov.b32 a, t; st.shared.b32 [a+8], $1; }", "=r,r", "outside"),
        (".shared .align 4 .b8 t[8]; { .reg .b32 a; mov.b32 a, t; st.shared.b32 [a+2], $1; }", "=r,r", "multiple of 4"),
        (".shared .align 4 .b8 t[8]; { .reg .b32 a; mov.b32 a, t; st.shared.b32 [a], $1; }", "=r,r", "different bytes"),
    ],
)
def test_what_is_undefined_is_an_error(text, constraints, message):
    with pytest.raises(ptx.PtxError, match=message):
        ptx.run(text, constraints, [np.arange(2, dtype=np.uint32)], ptx.Shared())

"""The inline assembly of `kernels.decode`, run by an emulator: every word's half, and every single change of the text.

The expected weights come from the codec in float64, rounded by torch, and not from the table that the strings read. That a
change of the text fails is tried on all of them: those that survive are listed below, each with the reason why it is no
change at all.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch

from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.vllm.kernels import decode, head_decode
from gptoss_nf4.vllm.kernels.codebook import best_factor, codebook

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BITS = {torch.bfloat16: 8, torch.float16: 11}
TABLES = [(quant_type, dtype) for dtype in BITS for quant_type in CODEBOOKS]
SCALED = {torch.bfloat16: decode.SCALED_PERMUTES_BF16.value, torch.float16: decode.SCALED_PERMUTES_FP16.value}
SCALED_LOOKUPS = {torch.bfloat16: decode.SCALED_LOOKUPS_BF16.value, torch.float16: decode.SCALED_LOOKUPS_FP16.value}
TIMES = {torch.bfloat16: decode.TIMES_BF16.value, torch.float16: decode.TIMES_FP16.value}
# absmax in units of 1 / 256 as the kernels have them: usual ones, a zero block, and the ends of what is packed.
SCALES = (0.0, 2.0**-14, 0.0271, 0.5, 1.0, 3.3, 100.7, 65280.0)


def all_halves() -> np.ndarray:
    """uint32 [65536]: each pattern of 16 bits once in the lower half and once in the upper one."""
    half = np.arange(1 << 16, dtype=np.uint32)
    other = np.random.default_rng(0).permutation(1 << 16).astype(np.uint32)
    return half | other << np.uint32(16)


def some_words(count: int = 384) -> np.ndarray:
    """uint32 [count]: enough for a mutant, whose fault shows in one code of sixteen."""
    return np.random.default_rng(1).integers(0, 1 << 32, count, dtype=np.uint32)


def expected_pairs(
    words: np.ndarray, quant_type: str, dtype: torch.dtype, scales: tuple = (None, None)
) -> list[np.ndarray]:
    """The bits of the four pairs of weights (h, r), from the codec; `scales`: absmax of r = 0 and 1, in `dtype`."""
    values = torch.from_numpy(CODEBOOKS[quant_type].astype(np.float64) * best_factor(quant_type, BITS[dtype])).to(dtype)
    pairs = []
    for pair in range(4):
        halves = []
        for p in range(2):
            codes = torch.from_numpy(((words >> np.uint32(4 * (2 * pair + p))) & np.uint32(15)).astype(np.int64))
            weight, scale = values[codes], scales[pair % 2]
            if scale is not None:  # exact in float64, then rounded once
                weight = (weight.double() * scale.double()).to(dtype)
            halves.append(weight.view(torch.int16).numpy().view(np.uint16).astype(np.uint32))
        pairs.append(halves[0] | halves[1] << np.uint32(16))
    return pairs


def table_rows(quant_type: str, dtype: torch.dtype) -> list[np.ndarray]:
    """Rows 0 to 9 of the table as `load_table` gives them to a lane."""
    return list(codebook(quant_type, dtype, CPU).table[:10, 0].numpy())


# ---- what the strings do ----


def permuted(text: str, words: np.ndarray, quant_type: str, dtype: torch.dtype) -> list[np.ndarray]:
    return ptx.run(text, decode.PERMUTES_CONSTRAINTS.value, [words, *table_rows(quant_type, dtype)])


def scaled(text: str, words: np.ndarray, quant_type: str, dtype: torch.dtype, scales: tuple) -> list[np.ndarray]:
    """`decode_scaled`: absmax stands twice in a register."""
    pairs = [np.uint32(int(scale.view(torch.int16)) & 0xFFFF) * np.uint32(0x10001) for scale in scales]
    inputs = [words, *table_rows(quant_type, dtype), *pairs]
    return ptx.run(text, decode.SCALED_PERMUTES_CONSTRAINTS.value, inputs)


@cache
def filled(declare: str, store: str, quant_type: str, dtype: torch.dtype) -> tuple[ptx.Shared, int]:
    """A table of pairs in shared memory, filled as `fill_shared` does, and its address."""
    shared = ptx.Shared()
    shared.declare("something_in_front", 4, 4)  # so that an alignment has to be asked for
    (base,) = ptx.run(declare, "=r", [], shared)
    bits = codebook(quant_type, dtype, CPU).table[10, :16].numpy().astype(np.uint32)
    high, low, four = np.meshgrid(np.arange(16), np.arange(16), np.arange(8), indexing="ij")
    places = (base + (high * 16 + low) * 128 + four * 16).astype(np.int32)
    ptx.run(store, "=r,r,r", [places, bits[low] | bits[high] << np.uint32(16)], shared)
    return shared, int(base)


@dataclass(frozen=True)
class Lookup:
    """The strings of `fill_shared` and `lookup`."""

    declare: str = decode.DECLARE_PAIRS.value
    store: str = decode.STORE_FOUR_TIMES.value
    look: str = decode.LOOKUPS.value

    def __call__(self, words: np.ndarray, quant_type: str, dtype: torch.dtype) -> list[np.ndarray]:
        """Word i is looked up by lane i % 32."""
        shared, base = filled(self.declare, self.store, quant_type, dtype)
        column = (base + np.arange(len(words)) % 32 * 4).astype(np.int32)
        return ptx.run(self.look, decode.LOOKUPS_CONSTRAINTS.value, [words, column], shared)


def looked_up_and_scaled(text: str, words: np.ndarray, quant_type: str, dtype: torch.dtype, scales: tuple) -> list:
    """`lookup_scaled`: absmax stands twice in a register."""
    shared, base = filled(decode.DECLARE_PAIRS.value, decode.STORE_FOUR_TIMES.value, quant_type, dtype)
    column = (base + np.arange(len(words)) % 32 * 4).astype(np.int32)
    pairs = [np.uint32(int(scale.view(torch.int16)) & 0xFFFF) * np.uint32(0x10001) for scale in scales]
    return ptx.run(text, decode.SCALED_LOOKUPS_CONSTRAINTS.value, [words, column, *pairs], shared)


# ---- the head in 12 bits ----

UPPER = np.array([0x00, 0x3C, 0x3B, 0x3A, 0x39, 0x15, 0x7E, 0x08], np.uint32)  # of a table, each once


def expected_weights(words: np.ndarray, low: tuple[np.ndarray, np.ndarray], shift: int) -> list[np.ndarray]:
    """By the format that `twelve_bits` describes: pairs (h, r) of weights j = 2r + p, uint32."""
    upper = UPPER & (0x7F >> shift)
    pairs = []
    for h in range(2):
        for r in range(2):
            halves = []
            for j in (2 * r, 2 * r + 1):
                index = words >> np.uint32(4 * (4 * h + j)) & 7
                sign = words >> np.uint32(8 * j + 7 - 4 * h) & 1
                byte = low[h] >> np.uint32(8 * j) & 255
                halves.append((upper[index] << np.uint32(8) | byte) << np.uint32(shift) | sign << np.uint32(15))
            pairs.append(halves[0] | halves[1] << np.uint32(16))
    return pairs


def expanded(text: str, words: np.ndarray, low: tuple[np.ndarray, np.ndarray], shift: int) -> list[np.ndarray]:
    table = (UPPER & (0x7F >> shift)).astype(np.uint8).view(np.uint32)
    return ptx.run(text, head_decode.EXPAND_CONSTRAINTS.value, [words, *low, *table])


EXPANSIONS = {0: head_decode.EXPAND.value, 3: head_decode.EXPAND_SHIFTED.value}


def some_low_bytes(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(12)
    return tuple(random.integers(0, 1 << 32, count, dtype=np.uint32) for _ in range(2))


@pytest.mark.parametrize("shift", EXPANSIONS)
def test_the_head_decodes_every_half_of_a_word(shift):
    words = all_halves()
    low = some_low_bytes(len(words))
    assert equal(expanded(EXPANSIONS[shift], words, low, shift), expected_weights(words, low, shift))


def equal(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("quant_type", "dtype"), TABLES)
def test_permutes_decode_every_half_of_a_word(quant_type, dtype):
    words = all_halves()
    assert equal(permuted(decode.PERMUTES.value, words, quant_type, dtype), expected_pairs(words, quant_type, dtype))


@pytest.mark.parametrize(("quant_type", "dtype"), TABLES)
def test_lookups_decode_every_half_of_a_word(quant_type, dtype):
    words = all_halves()
    assert equal(Lookup()(words, quant_type, dtype), expected_pairs(words, quant_type, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("quant_type", "dtype"), TABLES)
def test_scaled_permutes_round_the_product_once(quant_type, dtype):
    words = all_halves()
    for scales in zip(SCALES[::2], SCALES[1::2], strict=True):
        rounded = tuple(torch.tensor(scale, dtype=dtype) for scale in scales)
        found = scaled(SCALED[dtype], words, quant_type, dtype, rounded)
        assert equal(found, expected_pairs(words, quant_type, dtype, rounded)), scales


@pytest.mark.slow
@pytest.mark.parametrize(("quant_type", "dtype"), TABLES)
def test_scaled_lookups_round_the_product_once(quant_type, dtype):
    words = all_halves()
    for scales in zip(SCALES[::2], SCALES[1::2], strict=True):
        rounded = tuple(torch.tensor(scale, dtype=dtype) for scale in scales)
        found = looked_up_and_scaled(SCALED_LOOKUPS[dtype], words, quant_type, dtype, rounded)
        assert equal(found, expected_pairs(words, quant_type, dtype, rounded)), scales


def some_halves(dtype: torch.dtype, seed: int, size: float = 1.0) -> torch.Tensor:
    """`dtype` [4096]: usual numbers, zeros, and the smallest and largest."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * size
    values[::64], values[1::64], values[2::64] = 0.0, 3e-8, -60000.0
    return values.to(dtype)


def multiplied(text: str, dtype: torch.dtype) -> bool:
    """Whether the text multiplies pairs of `dtype`, each rounded once."""
    values, scales = some_halves(dtype, 0, 100.0), some_halves(dtype, 1).abs().clamp(max=1).roll(7)
    scales[10::64] = 0.0  # in the other half: a negative number times 0 is -0
    pairs = [each.view(torch.int16).numpy().view(np.uint32) for each in (values, scales)]
    (found,) = ptx.run(text, "=r,r,r", pairs)
    right = (values.double() * scales.double()).to(dtype)
    return np.array_equal(found.view(np.int16), right.view(torch.int16).numpy())


@pytest.mark.parametrize("dtype", BITS)
def test_absmax_of_inputs_multiplies_pairs(dtype):
    assert multiplied(TIMES[dtype], dtype)


def test_nibbles_and_halves_by_hand():
    """One word written out: nibble 2 (h, r) + p of the word is weight p of pair (h, r), and weight 0 the lower half."""
    codes = [15, 0, 7, 3, 8, 12, 1, 14]  # of nibbles 0 to 7
    word = np.array([sum(code << 4 * nibble for nibble, code in enumerate(codes))], np.uint32)
    factor = best_factor("nf4", 11)
    values = [np.float16(float(CODEBOOKS["nf4"][code]) * factor) for code in codes]
    for text_of in (permuted, lambda _, *rest: Lookup()(*rest)):
        pairs = text_of(decode.PERMUTES.value, word, "nf4", torch.float16)
        assert [list(pair.view(np.float16)) for pair in pairs] == [values[2 * pair : 2 * pair + 2] for pair in range(4)]


@pytest.mark.slow
def test_the_kernels_decode_through_their_assembly():
    """The functions around the strings too: Triton's interpreter runs the kernels, and the emulator their assembly."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "ptx_cases.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 28
    for result in results:
        assert result["wrong"] == 0, result
        assert result["ran"] > 0, result


# ---- mutants: each single change of a text ----


@dataclass(frozen=True)
class Mutant:
    """A text with one change; what it was, so that an equivalent one can be recognised."""

    text: str
    statement: str
    operand: int  # -1: the instruction itself
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.statement} [{self.operand}] {self.old} -> {self.new}"


def mutants(text: str) -> Iterator[Mutant]:
    """Every statement left out, every instruction replaced by those of its kind, every operand by those of its kind."""
    local = re.findall(r"\.reg\s+\.b32\s+([^;]*);", text)
    names = [name.strip() for name in ",".join(local).split(",") if name.strip()]
    places = sorted(set(re.findall(r"\$\d+", text)), key=lambda name: int(name[1:]))
    for match in re.finditer(r"[a-z.][^;{}]*(?:\{[^}]*\}[^;]*)*;", text):
        statement = match[0]
        if statement.startswith(".reg"):
            continue
        opcode, _, rest = statement.partition(" ")

        def changed(place: int, old: str, new: str, operand: int, match: re.Match = match) -> Mutant:
            start = match.start() + place
            return Mutant(text[:start] + new + text[start + len(old) :], match[0], operand, old, new)

        yield changed(0, statement, "", -1)
        if opcode in ptx.OPERATIONS:
            kind = ptx.OPERATIONS[opcode]
            for other, operation in ptx.OPERATIONS.items():
                if other != opcode and (operation.result, operation.sources) == (kind.result, kind.sources):
                    yield changed(0, opcode, other, -1)
        for operand, token in enumerate(re.finditer(r"0x[0-9a-f]+|\$\d+|(?<![\w.])[a-z]\w*|(?<![\w.])\d+", rest)):
            old, place = token[0], len(opcode) + 1 + token.start()
            for new in _other_operands(opcode, operand, old, names, places):
                yield changed(place, old, new, operand)


def _other_operands(opcode: str, operand: int, old: str, names: list[str], places: list[str]) -> Iterator[str]:
    if old[0].isdigit():
        number = int(old, 0)
        if opcode == "prmt.b32" and operand == 3:  # four selectors
            yield from (
                hex(number & ~(15 << 4 * nibble) | value << 4 * nibble)
                for nibble in range(4)
                for value in range(16)
                if number >> 4 * nibble & 15 != value
            )
            return
        yield from (hex(number ^ (1 << bit)) if old.startswith("0x") else str(number ^ (1 << bit)) for bit in range(32))
    elif old in places:
        yield from (each for each in places if each != old)
    elif operand > 0 and old in names:  # a target that nothing reads would be as good as another
        yield from (each for each in names if each != old)


@dataclass(frozen=True)
class Equivalent:
    """A kind of mutant that decodes the same, and why."""

    why: str
    statement: str
    covers: Callable[[Mutant], bool]


def _bit(mutant: Mutant) -> int:
    return int(mutant.old, 0) ^ int(mutant.new, 0)


def _zero_byte(mutant: Mutant) -> bool:
    """Whether only selectors of bytes 4 to 7, or of their signs, differ."""
    old, new = int(mutant.old, 16), int(mutant.new, 16)
    changed = [(old >> place & 15, new >> place & 15) for place in range(0, 16, 4) if (old ^ new) >> place & 15]
    return all(one & 4 and other & 4 for one, other in changed)


OF_PERMUTES = [
    Equivalent(
        "where 0x32103210 has a 1, `or` gives 1 whatever the mask lets through",
        "lop3.b32",
        lambda m: m.old == "0x44444444" and _bit(m) & 0x32103210 != 0,
    ),
    Equivalent(
        "no bit is set in both constants, so rows 3 and 7 of the truth table are never asked",
        "lop3.b32",
        lambda m: m.old == "0xea" and _bit(m) in (1 << 3, 1 << 7),
    ),
    Equivalent(
        "word >> 1 has no bit 31",
        "lop3.b32",
        lambda m: m.old == "0x44444444" and _bit(m) == 1 << 31,
    ),
]
OF_LOOKUPS = [
    Equivalent(
        "the second register is 0: each of its bytes, and the sign of each, is 0",
        "prmt.b32",
        lambda m: m.old.startswith("0x444") and _zero_byte(m),
    ),
    Equivalent("of the constant 0 only the lowest byte is selected", "prmt.b32", lambda m: m.old == "0" and _bit(m) > 255),
    Equivalent("the low 32 bits of a product are the same for both signs", "mad.lo.u32", lambda m: m.new == "mad.lo.s32"),
]
OF_STORING = [Equivalent("nobody reads the output of the store", "mov.b32 $0, 0", lambda m: m.old == "0")]
OF_DECLARING = [
    Equivalent(
        "a table larger than needed, up to what a program may have",
        ".shared",
        lambda m: m.old == str(decode.PAIRS_BYTES) and decode.PAIRS_BYTES < int(m.new) <= ptx.MAX_STATIC_BYTES - 16,
    ),
]


OF_THE_HEAD = [
    Equivalent(
        "no value of the table has the sign's bit, so rows 5 and 7 of the truth table are never asked",
        "lop3.b32",
        lambda m: m.old == "0xf8" and _bit(m) in (1 << 5, 1 << 7),
    ),
    Equivalent(
        "codes have no bit 31, by which the sign would be shifted in", "shr.u32 code", lambda m: m.new[:4] == "shr."
    ),
]
OF_THE_HEAD_BY_SHIFT = {
    0: [
        Equivalent(
            "a word shifted left by 4 has no bits 0 to 3",
            "lop3.b32 key, key, sign",
            lambda m: m.old == "0x80808080" and _bit(m) < 16,
        ),
    ],
    3: [
        Equivalent("bits 29 to 31 are no signs that the mask lets through", "shr.u32 sign", lambda m: m.new[:4] == "shr."),
        Equivalent(
            "bits 5 to 7 of bytes 1 and 3 leave the upper half of a pair by the last shift",
            "lop3.b32 key, key, sign",
            lambda m: m.old == "0x10101010" and _bit(m) & 0xE000E000 != 0,
        ),
        Equivalent(
            "a word shifted left by 1 has no bit 0",
            "lop3.b32 key, key, sign, 0x10101010",
            lambda m: m.old == "0x10101010" and _bit(m) == 1 and m.text.count("0x10101011, 0xf8") == 1 and _second_sign(m),
        ),
    ],
}


def _second_sign(mutant: Mutant) -> bool:
    """Whether the change comes after the signs of h = 1 were made."""
    return mutant.text.index("0x10101011") > mutant.text.index("shl.b32 sign")


def lives(mutant: Mutant, decodes: Callable[[str], bool]) -> bool:
    try:
        return decodes(mutant.text)
    except ptx.PtxError:
        return False


def assert_only_equivalents_live(
    every: list[Mutant], decodes: Callable[[str], bool], equivalents: list[Equivalent]
) -> None:
    """Those that decode as the text does are those said to be equivalent: no more, and no fewer."""
    alive = {mutant for mutant in every if lives(mutant, decodes)}
    for mutant in every:
        claimed = any(mutant.statement.startswith(each.statement) and each.covers(mutant) for each in equivalents)
        assert (mutant in alive) <= claimed, f"decodes the same: {mutant}"
        assert (mutant in alive) >= claimed, f"said to be equivalent, and is not: {mutant}"
    for each in equivalents:
        covered = [mutant for mutant in every if mutant.statement.startswith(each.statement) and each.covers(mutant)]
        assert covered, f"no mutant is equivalent because {each.why}"


@pytest.mark.slow
def test_every_change_of_the_permutes_fails():
    words, text = some_words(), decode.PERMUTES.value
    expected = {each: expected_pairs(words, *each) for each in TABLES}

    def decodes(changed: str) -> bool:
        return all(equal(permuted(changed, words, *each), expected[each]) for each in TABLES)

    every = list(mutants(text))
    assert decodes(text)
    assert len(every) > 900
    assert_only_equivalents_live(every, decodes, OF_PERMUTES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize(
    ("texts", "run", "unscaled", "least"),
    [(SCALED, scaled, decode.PERMUTES.value, 200), (SCALED_LOOKUPS, looked_up_and_scaled, decode.LOOKUPS.value, 100)],
    ids=["permutes", "lookups"],
)
def test_every_change_of_the_scaling_fails(texts, run, unscaled, least, dtype):
    """Of what the text has in addition to decoding without a scale."""
    words, text = some_words(), texts[dtype]
    scales = [tuple(torch.tensor(each, dtype=dtype) for each in pair) for pair in ((0.0271, 3.3), (0.0, 1.7), (2.9, 0.0))]
    cases = [(quant_type, pair) for quant_type in CODEBOOKS for pair in scales]
    expected = [expected_pairs(words, quant_type, dtype, pair) for quant_type, pair in cases]

    def decodes(changed: str) -> bool:
        return all(
            equal(run(changed, words, quant_type, dtype, pair), pairs)
            for (quant_type, pair), pairs in zip(cases, expected, strict=True)
        )

    every = [mutant for mutant in mutants(text) if mutant.statement not in unscaled]
    assert decodes(text)
    assert len(every) > least
    assert_only_equivalents_live(every, decodes, [])


@pytest.mark.parametrize("dtype", BITS)
def test_every_change_of_a_product_of_pairs_fails(dtype):
    every = list(mutants(TIMES[dtype]))
    assert len(every) > 20
    assert_only_equivalents_live(every, lambda text: multiplied(text, dtype), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "least", "equivalents"), [("declare", 30, OF_DECLARING), ("store", 30, OF_STORING), ("look", 200, OF_LOOKUPS)]
)
def test_every_change_of_the_lookups_fails(part, least, equivalents):
    words, text = some_words(), getattr(Lookup(), part)
    expected = {each: expected_pairs(words, *each) for each in TABLES}

    def decodes(changed: str) -> bool:
        return all(equal(Lookup(**{part: changed})(words, *each), expected[each]) for each in TABLES)

    every = list(mutants(text))
    assert decodes(text)
    assert len(every) > least
    assert_only_equivalents_live(every, decodes, equivalents)


@pytest.mark.slow
@pytest.mark.parametrize("shift", EXPANSIONS)
def test_every_change_of_the_heads_decoding_fails(shift):
    words, text = some_words(), EXPANSIONS[shift]
    low = some_low_bytes(len(words))
    expected = expected_weights(words, low, shift)

    def decodes(changed: str) -> bool:
        return equal(expanded(changed, words, low, shift), expected)

    every = list(mutants(text))
    assert decodes(text)
    assert len(every) > 600
    assert_only_equivalents_live(every, decodes, OF_THE_HEAD + OF_THE_HEAD_BY_SHIFT[shift])


def test_every_exchange_of_two_rows_of_the_table_fails():
    """For NF4, whose values have no equal bytes in common; FP4 has each value with both signs."""
    words = some_words()
    for dtype in BITS:
        rows, expected = table_rows("nf4", dtype), expected_pairs(words, "nf4", dtype)
        for one in range(10):
            for other in range(one):
                changed = list(rows)
                changed[one], changed[other] = rows[other], rows[one]
                found = ptx.run(decode.PERMUTES.value, decode.PERMUTES_CONSTRAINTS.value, [words, *changed])
                assert not equal(found, expected), (dtype, one, other)

"""Runs the PTX of inline assembly without a GPU: each instruction on numpy arrays, one element for each lane.

    outputs = run("lop3.b32 $0, $1, 0x0f0f0f0f, 0x44444444, 0xea;", "=r,r", [words])

Text and constraints are as `tl.inline_asm_elementwise` takes them. The semantics are those of NVIDIA's "Parallel Thread
Execution ISA", chapter "Instruction Set"; the functions below name its sections by their titles, since the numbers change
from release to release. What the document leaves undefined, and what this file does not know, is a `PtxError`:

- an unknown instruction, modifier or directive; a wrong number or kind of operands; a register of another width
- a register or byte of shared memory that is read before it is written, or that a guard leaves as it was before; an output
  that is never written
- an input that is written; an input read after an output without `&`, for which the compiler may take the same register
- an address that is not aligned or lies outside of what was declared; lanes that store different bytes to one place

To add an instruction, add a line to `OPERATIONS`.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
PREDICATE = 1  # bits of a predicate register
CONSTRAINT_BITS = {"h": 16, "r": 32, "f": 32, "l": 64}
MAX_STATIC_BYTES = 48 * 1024  # "CUDA C++ Programming Guide", Shared Memory: more has to be asked for at the launch


class PtxError(Exception):
    """The text is no valid PTX, does something undefined, or is beyond this emulator."""


def run(text: str, constraints: str, inputs: Sequence[np.ndarray], shared: "Shared | None" = None) -> list[np.ndarray]:
    """What the text writes to its outputs.

    Args:
        text: with operands $0, $1, ..: the outputs, then the inputs.
        constraints: as LLVM takes them, "=r,=&r,r": one for each operand.
        inputs: arrays of integers or floats of the constraints' widths, which broadcast. Their bits are taken.
        shared: the memory of the program. It keeps what is declared and stored; needed for `.shared` only.

    Returns:
        Unsigned arrays of the constraints' widths, one for each output.
    """
    kinds = [kind.strip() for kind in constraints.split(",")]
    outputs = sum(kind.startswith("=") for kind in kinds)
    if any(kind.startswith("=") for kind in kinds[outputs:]) or len(kinds) - outputs != len(inputs):
        raise PtxError(f"constraints {constraints!r} for {len(inputs)} inputs")
    machine = _Machine(shared)
    for place, kind in enumerate(kinds):
        if kind.lstrip("=&") not in CONSTRAINT_BITS:
            raise PtxError(f"constraint {kind!r}: not one of {', '.join(CONSTRAINT_BITS)}")
        register = Register(f"${place}", CONSTRAINT_BITS[kind.lstrip("=&")])
        if place >= outputs:
            register.value = _bits(inputs[place - outputs], register)
            register.role = "input"
        else:
            register.role = "early output" if "&" in kind else "output"
        machine.scopes[0][register.name] = register
    for statement in _statements(text):
        machine.execute(statement)
    if len(machine.scopes) != 1:
        raise PtxError("a { without }")
    registers = [machine.scopes[0][f"${place}"] for place in range(outputs)]
    return [machine.read(register) for register in registers]


@dataclass
class Register:
    name: str
    bits: int
    value: np.ndarray | None = None
    role: str = "local"


@dataclass
class Shared:
    """Shared memory of a program: bytes, and which of them were stored."""

    symbols: dict[str, int] = field(default_factory=dict)
    base: int = 1024  # an address of 0 would hide a missing base
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    stored: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def declare(self, name: str, align: int, size: int) -> None:
        if name in self.symbols:
            raise PtxError(f"{name} is declared twice")
        if align <= 0 or align & (align - 1):
            raise PtxError(f"an alignment of {align}: no power of two")
        start = -(-len(self.bytes) // align) * align
        if start + size > MAX_STATIC_BYTES:
            raise PtxError(f"{start + size} bytes of static shared memory; at most {MAX_STATIC_BYTES}")
        self.symbols[name] = self.base + start
        grown = start + size - len(self.bytes)
        self.bytes = np.concatenate((self.bytes, np.zeros(grown, np.uint8)))
        self.stored = np.concatenate((self.stored, np.zeros(grown, bool)))

    def _places(self, address: np.ndarray, size: int) -> np.ndarray:
        """Indices [.., size] of the bytes from `address` on."""
        if (address % size).any():
            raise PtxError(f"an address that is no multiple of {size}")
        places = address.astype(np.int64)[..., None] - self.base + np.arange(size)
        if (places < 0).any() or (places >= len(self.bytes)).any():
            raise PtxError("an address outside of what is declared")
        return places

    def load(self, address: np.ndarray, count: int, bits: int) -> list[np.ndarray]:
        places = self._places(address, count * bits // 8)
        if not self.stored[places].all():
            raise PtxError("shared memory that was not stored to")
        loaded = np.ascontiguousarray(self.bytes[places]).view(UNSIGNED[bits])
        return [loaded[..., element] for element in range(count)]

    def store(self, address: np.ndarray, values: list[np.ndarray], bits: int) -> None:
        elements = np.stack(np.broadcast_arrays(*values), -1).astype(UNSIGNED[bits])
        places = self._places(address, len(values) * bits // 8)
        stored = np.broadcast_to(elements.view(np.uint8), places.shape)
        self.bytes[places] = stored
        if (self.bytes[places] != stored).any():
            raise PtxError("lanes store different bytes to one place")
        self.stored[places] = True


# ---- the text ----

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(?:([bu])(16|32|64)|(pred))\s+(.*)", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+(\w+)\[(\d+)\]")
_INSTRUCTION = re.compile(r"(?:@(!?)(\w+)\s+)?([a-z][\w.]*)\s+(.*)", re.DOTALL)
_MEMORY = re.compile(r"(ld|st)\.shared(?:\.v([24]))?\.[bus](8|16|32|64)")
_PREFETCH = re.compile(r"prefetch\.global\.L[12]")
_MOVE = re.compile(r"mov\.[bu](16|32|64)")
_ADDRESS = re.compile(r"\[\s*(\S+?)\s*(?:\+\s*(\w+)\s*)?\]")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)[uU]?")
_NAME = re.compile(r"\$\d+|[A-Za-z_%]\w*")


def _statements(text: str) -> list[str]:
    """Braces that open and close a scope, and what ends in a semicolon."""
    statements, rest = [], _COMMENT.sub(" ", text).strip()
    while rest:
        if rest[0] in "{}":
            statements.append(rest[0])
            rest = rest[1:].lstrip()
            continue
        statement, semicolon, rest = rest.partition(";")
        if not semicolon:
            raise PtxError(f"no semicolon after {statement!r}")
        statements.append(statement.strip())
        rest = rest.lstrip()
    return statements


def _operands(text: str) -> list[str]:
    """Split at commas, but not within braces."""
    operands, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            operands.append("")
        else:
            operands[-1] += character
    return [operand.strip() for operand in operands]


class _Machine:
    """Registers by scope. "State Spaces, Types, and Variables" in the document."""

    def __init__(self, shared: Shared | None):
        self.scopes: list[dict[str, Register]] = [{}]
        self._shared = shared
        self._clobbered: str | None = None  # an output without & that was written

    @property
    def shared(self) -> Shared:
        if self._shared is None:
            raise PtxError("shared memory, but none was given to `run`")
        return self._shared

    def execute(self, statement: str) -> None:
        try:
            self._execute(statement)
        except PtxError as error:
            raise PtxError(f"{statement}: {error}") from None

    def _execute(self, statement: str) -> None:
        if statement == "{":
            self.scopes.append({})
        elif statement == "}":
            if len(self.scopes) == 1:
                raise PtxError("a } without {")
            self.scopes.pop()
        elif match := _REGISTERS.fullmatch(statement):
            for name in _operands(match[4]):
                if not _NAME.fullmatch(name) or name in self.scopes[-1]:
                    raise PtxError(f"register name {name!r}: not a name, or taken")
                self.scopes[-1][name] = Register(name, PREDICATE if match[3] else int(match[2]))
        elif match := _SHARED.fullmatch(statement):
            self.shared.declare(match[2], int(match[1] or 1), int(match[3]))
        elif match := _INSTRUCTION.fullmatch(statement):
            self._instruction(match[3], _operands(match[4]), self._guard(match[1], match[2]))
        else:
            raise PtxError("not understood")

    def _guard(self, negated: str | None, name: str | None) -> np.ndarray | None:
        """In which lanes the instruction runs; None: in all. "Predicated Execution"."""
        if name is None:
            return None
        value = self._source(name, PREDICATE)
        return ~value if negated else value

    def _instruction(self, opcode: str, operands: list[str], guard: np.ndarray | None) -> None:
        if match := _MEMORY.fullmatch(opcode):
            self._memory(match[1], int(match[2] or 1), int(match[3]), operands, guard)
        elif _PREFETCH.fullmatch(opcode):  # changes nothing that can be seen
            address = _ADDRESS.fullmatch(operands[0])
            if address is None or len(operands) != 1:
                raise PtxError("expected an address")
            self._source(address[1], 64)
        elif match := _MOVE.fullmatch(opcode):
            self._move(int(match[1]), operands, guard)
        elif opcode in OPERATIONS:
            operation = OPERATIONS[opcode]
            if len(operands) != 1 + len(operation.sources):
                raise PtxError(f"{len(operands)} operands, expected {1 + len(operation.sources)}")
            sources = [self._source(text, bits) for text, bits in zip(operands[1:], operation.sources, strict=True)]
            with np.errstate(all="ignore"):
                self._write(operands[0], operation.result, operation.compute(*sources), guard)
        else:
            raise PtxError("unknown instruction")

    def _memory(self, what: str, count: int, bits: int, operands: list[str], guard: np.ndarray | None) -> None:
        """ "Data Movement and Conversion Instructions: ld, st"."""
        if len(operands) != 2:
            raise PtxError(f"{len(operands)} operands, expected 2")
        if guard is not None:
            raise PtxError("memory accesses with a guard are not emulated")
        place, data = operands if what == "st" else operands[::-1]
        names = _operands(data[1:-1]) if data.startswith("{") and data.endswith("}") else [data]
        address = _ADDRESS.fullmatch(place)
        if address is None or len(names) != count:
            raise PtxError(f"expected an address and {count} registers")
        start = self._source(address[1], 32).astype(np.int64) + int(address[2] or "0", 0)
        if what == "st":
            values = [self._source(name, bits) for name in names]
            self.shared.store(np.broadcast_arrays(start, *values)[0], values, bits)
            return
        for name, value in zip(names, self.shared.load(start, count, bits), strict=True):
            self._write(name, bits, value, None)

    def _move(self, bits: int, operands: list[str], guard: np.ndarray | None) -> None:
        """ "Data Movement and Conversion Instructions: mov", which also packs and unpacks: lowest bits first."""
        if len(operands) != 2:
            raise PtxError(f"{len(operands)} operands, expected 2")
        target, source = operands
        if source.startswith("{"):
            parts = _operands(source.strip("{}"))
            values = [self._source(part, bits // len(parts)) for part in parts]
            shifted = [value.astype(UNSIGNED[bits]) << (place * bits // len(parts)) for place, value in enumerate(values)]
            self._write(target, bits, np.bitwise_or.reduce(np.broadcast_arrays(*shifted)), guard)
        elif target.startswith("{"):
            parts, value = _operands(target.strip("{}")), self._source(source, bits)
            for place, part in enumerate(parts):
                self._write(part, bits // len(parts), value >> UNSIGNED[bits](place * bits // len(parts)), guard)
        elif self._shared is not None and source in self._shared.symbols:
            self._write(target, bits, np.array(self._shared.symbols[source]), guard)
        else:
            self._write(target, bits, self._source(source, bits), guard)

    # ---- operands ----

    def _find(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise PtxError(f"no register {name}")

    def _source(self, text: str, bits: int) -> np.ndarray:
        if _NUMBER.fullmatch(text):
            number = int(text.rstrip("uU"), 0)
            if bits == PREDICATE or not -(1 << (bits - 1)) <= number < 1 << bits:
                raise PtxError(f"{text} has no {bits} bits")
            return np.array(number & ((1 << bits) - 1), UNSIGNED[bits])
        register = self._find(text)
        if register.bits != bits:
            raise PtxError(f"{text} has {register.bits} bits, expected {bits}")
        if register.role == "input" and self._clobbered:
            raise PtxError(f"{text} may be in the register of {self._clobbered}, which was written and has no &")
        return self.read(register)

    def read(self, register: Register) -> np.ndarray:
        if register.value is None:
            raise PtxError(f"{register.name} is not set")
        return register.value

    def _write(self, name: str, bits: int, value: np.ndarray, guard: np.ndarray | None) -> None:
        register = self._find(name)
        if register.role == "input":
            raise PtxError(f"{name} is an input")
        if register.bits != bits:
            raise PtxError(f"{name} has {register.bits} bits, expected {bits}")
        value = np.asarray(value, bool if bits == PREDICATE else UNSIGNED[bits])
        if guard is not None and not guard.all():
            value = np.where(guard, value, self.read(register))
        register.value = value
        if register.role == "output":
            self._clobbered = name


def _bits(value: np.ndarray, register: Register) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.itemsize * 8 != register.bits:
        raise PtxError(f"{register.name} has {register.bits} bits, the input is {value.dtype}")
    return np.ascontiguousarray(value).view(UNSIGNED[register.bits]).reshape(value.shape)


# ---- instructions ----


@dataclass(frozen=True)
class Operation:
    """Bits of the result and of the sources, and how the one comes from the others: unsigned arrays, bool predicates."""

    result: int
    sources: tuple[int, ...]
    compute: Callable[..., np.ndarray]


_NIBBLES = np.arange(0, 16, 4, dtype=np.uint32)  # where the four selectors of `prmt` stand


def prmt(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """ "Data Movement and Conversion Instructions: prmt", default mode.

    The bytes of {b, a} are numbered from a's lowest, 0 to 7. Each of the four lowest nibbles of `selectors` picks one for
    a byte of the result: by its low three bits; if its top bit is set, the byte's sign fills all eight bits.
    """
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    selector = (selectors[..., None] >> _NIBBLES) & np.uint32(15)
    byte = both[..., None] >> ((selector & np.uint32(7)) * np.uint32(8)) & np.uint64(255)
    chosen = np.where(selector < 8, byte, (byte >> np.uint64(7)) * np.uint64(255))
    return chosen.astype(np.uint8).view(np.uint32)[..., 0]


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """ "Logic and Shift Instructions: lop3": bit 4a + 2b + c of the table, for each three bits."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    if int(table) > 255:
        raise PtxError("a table of more than 8 bits")
    for row in range(8):
        if int(table) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def shift_left(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """ "shl": amounts beyond the width give 0."""
    bits = a.dtype.itemsize * 8
    return np.where(amount < bits, a << np.minimum(amount, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """ "shr" of an unsigned type: amounts beyond the width give 0."""
    bits = a.dtype.itemsize * 8
    return np.where(amount < bits, a >> np.minimum(amount, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right_signed(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """ "shr" of a signed type: amounts beyond the width give copies of the sign."""
    signed = a.view(SIGNED[a.dtype.itemsize * 8])
    return (signed >> np.minimum(amount, a.dtype.itemsize * 8 - 1).astype(signed.dtype)).view(a.dtype)


def funnel(left: bool, wraps: bool) -> Callable[..., np.ndarray]:
    """ "shf": b is the upper word. To the left the upper word of the shifted pair, to the right the lower one."""

    def compute(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> np.ndarray:
        pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        by = (amount & np.uint32(31) if wraps else np.minimum(amount, 32)).astype(np.uint64)
        return ((pair << by) >> np.uint64(32) if left else pair >> by).astype(np.uint32)

    return compute


def field_of(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """ "Integer Arithmetic Instructions: bfe" of an unsigned type."""
    start, length = (each.astype(np.uint64) & np.uint64(255) for each in (start, length))
    mask = (np.uint64(1) << np.minimum(length, np.uint64(32))) - np.uint64(1)
    return ((a.astype(np.uint64) >> np.minimum(start, np.uint64(32))) & mask).astype(np.uint32)


def wide(compute: Callable[..., np.ndarray], result: type) -> Callable[..., np.ndarray]:
    """`compute` on sources widened to `result`."""
    return lambda *sources: compute(*(source.astype(result) for source in sources))


def upper_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ "mul.hi"."""
    return ((a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """ "mad.lo"; "mad.wide" on widened sources."""
    return a * b + c


def compare(relation: Callable[..., np.ndarray], signed: bool) -> Callable[..., np.ndarray]:
    """ "Comparison and Selection Instructions: setp"."""
    return lambda a, b: relation(a.view(np.int32), b.view(np.int32)) if signed else relation(a, b)


def halves_to_float64(pairs: np.ndarray, kind: str) -> np.ndarray:
    """The two numbers of each uint32, the one in the low bits first: float64 [.., 2]."""
    halves = np.stack((pairs & np.uint32(0xFFFF), pairs >> np.uint32(16)), -1)
    if kind == "bf16":
        return (halves << np.uint32(16)).view(np.float32).astype(np.float64)
    return halves.astype(np.uint16).view(np.float16).astype(np.float64)


def float64_to_halves(values: np.ndarray, kind: str) -> np.ndarray:
    """float64 [.., 2], each rounded once to nearest even, as uint32. NaN becomes 0x7fff, as the document says."""
    bits = _bfloat16_bits(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = np.where(np.isnan(values), np.uint32(0x7FFF), bits)
    return bits[..., 0] | (bits[..., 1] << np.uint32(16))


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """By way of float32 numbers that are multiples of bfloat16's unit, so that nothing is rounded twice."""
    fraction, exponent = np.frexp(values)
    unit = np.maximum(exponent - 8, -126 - 7)  # 8 bits of significand; subnormals have fewer
    rounded = np.ldexp(np.round(np.ldexp(fraction, exponent - unit)), unit)
    return rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)


def fused_multiply_add(kind: str) -> Callable[..., np.ndarray]:
    """ "Half Precision Floating-Point Instructions: fma", .rn: the exact a * b + c, rounded once; subnormals kept.

    In float64 the product is exact. The sum is rounded to odd, and 53 bits rounded to odd round to 8 or 11 bits as the
    exact sum does (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums").
    """

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        x, y, z = np.broadcast_arrays(*(halves_to_float64(each, kind) for each in (a, b, c)))
        product = x * y
        total = product + z
        back = total - product
        lost = (product - (total - back)) + (z - back)  # what the sum rounded off, exactly (Knuth's TwoSum)
        even = total.view(np.uint64) & np.uint64(1) == 0
        odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(np.isfinite(total) & (lost != 0) & even, odd, total)
        return float64_to_halves(total, kind)

    return compute


def pair_of_floats(kind: str) -> Callable[..., np.ndarray]:
    """ "cvt.rn.f16x2.f32": the first source goes to the upper half."""

    def compute(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        both = np.stack(np.broadcast_arrays(lower, upper), -1)
        return float64_to_halves(both.view(np.float32).astype(np.float64), kind)

    return compute


THREE = (32, 32, 32)
RELATIONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
OPERATIONS = {
    "prmt.b32": Operation(32, THREE, prmt),
    "lop3.b32": Operation(32, (*THREE, 32), lop3),
    "shf.l.wrap.b32": Operation(32, THREE, funnel(left=True, wraps=True)),
    "shf.l.clamp.b32": Operation(32, THREE, funnel(left=True, wraps=False)),
    "shf.r.wrap.b32": Operation(32, THREE, funnel(left=False, wraps=True)),
    "shf.r.clamp.b32": Operation(32, THREE, funnel(left=False, wraps=False)),
    "bfe.u32": Operation(32, THREE, field_of),
    "mul.wide.u16": Operation(32, (16, 16), wide(operator.mul, np.uint32)),
    "mul.wide.u32": Operation(64, (32, 32), wide(operator.mul, np.uint64)),
    "mul.hi.u32": Operation(32, (32, 32), upper_product),
    "mad.wide.u32": Operation(64, (32, 32, 64), wide(multiply_add, np.uint64)),
    "selp.b32": Operation(32, (32, 32, PREDICATE), lambda a, b, chosen: np.where(chosen, a, b)),
    "cvt.u32.u16": Operation(32, (16,), lambda a: a.astype(np.uint32)),
    "cvt.u16.u32": Operation(16, (32,), lambda a: a.astype(np.uint16)),
    "cvt.rn.f16x2.f32": Operation(32, (32, 32), pair_of_floats("f16")),
    "cvt.rn.bf16x2.f32": Operation(32, (32, 32), pair_of_floats("bf16")),
    "fma.rn.f16x2": Operation(32, THREE, fused_multiply_add("f16")),
    "fma.rn.bf16x2": Operation(32, THREE, fused_multiply_add("bf16")),
}
for _bits_of in (16, 32, 64):
    _two = (_bits_of, _bits_of)
    OPERATIONS |= {
        f"and.b{_bits_of}": Operation(_bits_of, _two, operator.and_),
        f"or.b{_bits_of}": Operation(_bits_of, _two, operator.or_),
        f"xor.b{_bits_of}": Operation(_bits_of, _two, operator.xor),
        f"not.b{_bits_of}": Operation(_bits_of, (_bits_of,), operator.invert),
        f"shl.b{_bits_of}": Operation(_bits_of, (_bits_of, 32), shift_left),
        f"shr.b{_bits_of}": Operation(_bits_of, (_bits_of, 32), shift_right),
        f"shr.u{_bits_of}": Operation(_bits_of, (_bits_of, 32), shift_right),
        f"shr.s{_bits_of}": Operation(_bits_of, (_bits_of, 32), shift_right_signed),
    }
    for _sign in "us":  # the low bits are the same
        OPERATIONS |= {
            f"add.{_sign}{_bits_of}": Operation(_bits_of, _two, operator.add),
            f"sub.{_sign}{_bits_of}": Operation(_bits_of, _two, operator.sub),
            f"mul.lo.{_sign}{_bits_of}": Operation(_bits_of, _two, operator.mul),
            f"mad.lo.{_sign}{_bits_of}": Operation(_bits_of, (*_two, _bits_of), multiply_add),
        }
for _name in ("eq", "ne"):
    OPERATIONS[f"setp.{_name}.b32"] = Operation(PREDICATE, (32, 32), compare(RELATIONS[_name], signed=False))
for _name, _relation in RELATIONS.items():
    OPERATIONS[f"setp.{_name}.u32"] = Operation(PREDICATE, (32, 32), compare(_relation, signed=False))
    OPERATIONS[f"setp.{_name}.s32"] = Operation(PREDICATE, (32, 32), compare(_relation, signed=True))

"""How long our kernels of a decode step take on a GPU that need not be here, reckoned from their machine code.

The programs of a kernel run in waves, as many at once as fit on the multiprocessors. A wave takes as long as the slowest of

    memory    its bytes at the read bandwidth
    latency   its bytes, if what its programs have asked for arrives once in a latency of memory (Little's law)
    issue     its instructions, one a cycle from each scheduler
    a pipe    those instructions of which the pipe takes one in several cycles, see `cards`

A kernel takes as long as its waves, and `ROUND_TRIPS` latencies for what cannot overlap, and the gap between two launches.

How often the loop of a kernel runs follows from its tensor-core instructions: all programs together must do the products of
the weight's tiles. Code outside of the loop counts once. A weight that fits into the L2 cache is read once, a larger one
for each block of activations; activations, which every program reads, are taken to come from the caches.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from math import ceil, exp, floor, lgamma, log, log1p, prod

import torch

from benchmarks import cards
from benchmarks.cards import SCHEDULERS, Card
from benchmarks.machine_code import GPUS, Launch, disassembled, instructions, launches_of, main_loop, resources
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.blocks import INPUTS
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.vllm.kernels import tiles

LAUNCH_US = 1.3  # between two kernels of a CUDA graph on an H100 (Hazy Research, "Look Ma, No Bubbles!", 2025)
ROUND_TRIPS = 3  # of a kernel: what its first loads depend on, the first tiles, and what its last lines load
MIDDLE = 8  # rows of activations of a program whose kernel has no constant BM


@dataclass(frozen=True)
class Code:
    """A kernel's machine code: cycles of each pipe of a scheduler, for a warp."""

    once: dict[str, float]
    """Of what runs once; "issue" counts instructions."""
    loop: dict[str, float]
    """Of one turn of the main loop."""
    products: int
    """Multiplications by tensor cores of a warp in a turn."""
    registers: int
    shared_bytes: int
    warps: int


def code_of(launch: Launch, capability: int) -> Code:
    """Compiles the launch; slow."""
    compiled = launch.compiled(capability)
    takes, code = resources(launch, compiled), instructions(disassembled(compiled, "-sass"))
    loop = main_loop(code)
    once: dict[str, float] = defaultdict(float)
    turn: dict[str, float] = defaultdict(float)
    products = 0
    for address, opcode, _ in code:
        inside = loop is not None and loop[0] <= address <= loop[1]
        kind = cards.pipe_of(opcode)
        counts = turn if inside else once
        counts[cards.SHARED_PIPES.get(kind, kind)] += cards.cycles(opcode, capability)
        counts["issue"] += 1
        if inside and kind == "tensor":
            products += cards.products(opcode)
    shared = takes.static_bytes + takes.dynamic_bytes
    return Code(once, turn, products, takes.registers, shared, compiled.metadata.num_warps)


@dataclass(frozen=True)
class Work:
    """What a launch has to do."""

    bytes: float
    programs: float
    """Those that do not return at once."""
    products: float
    """Multiplications on tensor cores, padding included."""


def mean_blocks(tokens: int, d: Dimensions, rows: int) -> tuple[float, float]:
    """Blocks of `rows` slots of all experts, and experts that have one, if every token chooses evenly."""
    chosen = d.experts_per_token / d.experts
    blocks = used = 0.0
    for count in range(1, tokens + 1):
        ways = lgamma(tokens + 1) - lgamma(count + 1) - lgamma(tokens - count + 1)  # logarithm; a number of them overflows
        share = d.experts * exp(ways + count * log(chosen) + (tokens - count) * log1p(-chosen))
        blocks += share * ceil(count / rows)
        used += share
    return blocks, used


def work_of(launch: Launch, tokens: int, card: Card, d: Dimensions) -> Work:
    arguments = launch.arguments
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    around = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    weight = arguments.get("weight")
    if weight is None or isinstance(weight, torch.Tensor):  # a dense one is among the tensors
        return Work(around, prod(launch.grid), 0)
    rows = arguments.get("BM", MIDDLE)
    experts, row_tiles, input_tiles, _, words = weight.codes.shape
    row_blocks, used, programs = float(ceil(tokens / rows)), 1.0, float(prod(launch.grid))
    if experts > 1:
        row_blocks, used = mean_blocks(tokens, d, rows)
        routing = arguments.get("routing")
        if routing is not None and routing.slots is not None:  # a grid for the worst case
            programs *= row_blocks / launch.grid[1]
    of_weight = (weight.codes.numel() * 4 + weight.absmax.numel() * 2) / experts
    tile = tiles.ROWS * words * tiles.ROWS * rows
    reads = used if of_weight < card.l2_bytes else row_blocks  # the next block of rows finds the weight in the L2, or not
    return Work(of_weight * reads + around, programs, row_tiles * input_tiles * tile * row_blocks)


@dataclass(frozen=True)
class Occupancy:
    programs: int
    """Of a multiprocessor at once."""
    warps: int
    limit: str


def occupancy(code: Code, card: Card) -> Occupancy:
    """As "CUDA C++ Programming Guide" has it: registers in units of 256 for a warp of a scheduler, 1 KiB of CUDA's own."""
    of_warp = ceil(code.registers * 32 / 256) * 256
    own = 1024 if card.capability < 90 else 0  # from Hopper on the machine code declares it
    by = {
        "registers": floor(card.registers / SCHEDULERS / of_warp) * SCHEDULERS // code.warps,
        "shared memory": floor(card.shared_bytes / (ceil((code.shared_bytes + own) / 128) * 128 or 1)),
        "warps": card.warps // code.warps,
        "programs": card.programs,
    }
    limit = min(by, key=lambda name: by[name])
    return Occupancy(by[limit], by[limit] * code.warps, limit)


@dataclass(frozen=True)
class Prediction:
    """Of a launch."""

    kernel: str
    us: float
    parts: dict[str, float]
    """Microseconds by each limit alone."""
    mb: float
    held: Occupancy
    registers: int
    shared_bytes: int
    in_flight: float
    """Bytes that a multiprocessor has asked for at a time."""
    needed: float
    """Bytes that it has to, by Little's law."""

    @property
    def limit(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def predict(launch: Launch, code: Code, tokens: int, card: Card, d: Dimensions = GPT_OSS_20B) -> Prediction:
    work, held = work_of(launch, tokens, card, d), occupancy(code, card)
    turns = max(1, ceil(work.products / code.products / work.programs / code.warps)) if code.products else 1
    pipes = {*code.once, *code.loop} - {"control"}
    spent = {pipe: code.once.get(pipe, 0.0) + turns * code.loop.get(pipe, 0.0) for pipe in pipes}
    of_program = work.bytes / work.programs
    parts: dict[str, float] = defaultdict(float)
    total, left = 0.0, work.programs
    while left > 1e-9:
        wave = min(left, held.programs * card.multiprocessors)
        left -= wave
        alone = {
            "memory": wave * of_program / card.read_gb_s / 1e3,
            "latency": turns * card.latency_ns / 1e3,
        }
        warps = ceil(wave / card.multiprocessors) * code.warps / SCHEDULERS
        alone |= {pipe: count * max(warps, 1) / card.clock_ghz / 1e3 for pipe, count in spent.items()}
        total += max(alone.values())
        for limit, us in alone.items():
            parts[limit] += us
    together = min(held.programs, work.programs / card.multiprocessors)
    return Prediction(
        kernel=launch.kernel,
        us=LAUNCH_US + ROUND_TRIPS * card.latency_ns / 1e3 + total,
        parts=dict(parts),
        mb=work.bytes / 1e6,
        held=held,
        registers=code.registers,
        shared_bytes=code.shared_bytes,
        in_flight=together * of_program / turns,
        needed=card.read_gb_s * card.latency_ns / card.multiprocessors,
    )


@cache
def layer(
    tokens: int, capability: int, dtype: torch.dtype = torch.bfloat16, blocks_along: str = INPUTS
) -> tuple[tuple[Launch, Code], ...]:
    """Our launches of a layer at this batch, with their machine code. Compiling takes seconds for each.

    blocks_along: of the experts.
    """
    found = launches_of(GPT_OSS_20B, dtype, GPUS[capability], [tokens], [tokens], blocks_along=blocks_along)
    codes: dict[str, Code] = {}
    for each in found:
        if each.label not in codes:
            codes[each.label] = code_of(each, capability)
    return tuple((each, codes[each.label]) for each in found)


def predictions(tokens: int, card: Card) -> dict[str, Prediction]:
    """Of a layer's launches by what they are for."""
    named = {}
    linear = iter(("q/k/v", "o"))
    for launch, code in layer(tokens, card.capability):
        result = predict(launch, code, tokens, card)
        named[next(linear) if launch.kernel.endswith(".linear") else NAMES.get(launch.kernel, launch.kernel)] = result
    return named


NAMES = {
    "small.swiglu_experts": "w13",
    "large.swiglu_experts": "w13",
    "small.down_experts": "w2",
    "large.down_experts": "w2",
    "sort._sort_slots": "sorting",
    "routing._route": "top-k and sorting",
    "router._router": "router",
    "combine._sum_slots": "sum of slots",
}

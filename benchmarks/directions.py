"""Experts with blocks along the outputs beside those along the inputs, reckoned from their machine code. Needs no GPU.

    python -m benchmarks.directions

Both are compiled here for an RTX 3090 and an H200: instructions of the innermost loop for each 4-bit weight that a lane
decodes, registers, spills, shared memory, and the microseconds that `prediction` gives. `benchmarks.kernels` measures both
on a GPU, `benchmarks.serving --contenders plugin plugin-fused` whole engines.

Beyond `prediction`, this knows that in the decoding kernels lanes of rows that are not in use load nothing. Of a load of
16 bytes a lane the caches serve eight lanes at a time, which have two rows.
"""

import re
from dataclasses import dataclass, replace
from math import ceil

import torch
import triton

from benchmarks import cards
from benchmarks.cards import H200, RTX_3090, Card
from benchmarks.machine_code import (
    GPUS,
    Launch,
    disassembled,
    instructions,
    launches_of,
    loop_length,
    main_loop,
    resources,
)
from benchmarks.prediction import NAMES, Code, Prediction, code_of, mean_blocks, predict
from benchmarks.tables import markdown
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.blocks import DIRECTIONS

TOKENS = (1, 8, 32, 64, 128, 2048)
PRODUCTS = ("w13", "w2")
COLUMNS = ["card", "tokens", "product", "instructions a weight", "registers", "spilled bytes", "shared KiB", "predicted us"]
COLUMNS += ["inputs / outputs", "limit"]


@dataclass(frozen=True)
class Compiled:
    """What a launch compiled to."""

    code: Code
    of_rows: float
    """Cycles of the caches in a turn of the loop that serve loads for rows of activations, if all are in use."""
    cells: list[str]
    """Of the table: instructions a weight, registers, spilled bytes, shared KiB."""


def experts(tokens: int, capability: int, along: str) -> dict[str, Launch]:
    """The launches of both products of a layer's experts, by name."""
    found = launches_of(GPT_OSS_20B, torch.bfloat16, GPUS[capability], [tokens], [], blocks_along=along)
    return {NAMES[launch.kernel]: launch for launch in found if NAMES.get(launch.kernel) in PRODUCTS}


def compiled(launch: Launch, capability: int) -> Compiled:
    kernel = launch.compiled(capability)
    takes, sass = resources(launch, kernel), disassembled(kernel, "-sass")
    loop, (first, last) = loop_length(sass), main_loop(instructions(sass)) or (0, -1)
    masked = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+@!?U?P\w+\s+(LDG\S*\.128\S*)", sass, re.MULTILINE)
    of_rows = sum(cards.cycles(opcode, capability) for address, opcode in masked if first <= int(address, 16) <= last)
    a_weight = f"{loop / launch.decoded:.2f}" if loop and launch.decoded else "-"
    shared = f"{(takes.static_bytes + takes.dynamic_bytes) / 1024:.0f}"
    cells = [a_weight, str(takes.registers), str(takes.spilled_bytes), shared]
    return Compiled(code_of(launch, capability), of_rows, cells)


def predicted(found: Compiled, launch: Launch, tokens: int, card: Card) -> Prediction:
    rows = launch.arguments["BM"]
    used = tokens * GPT_OSS_20B.experts_per_token / mean_blocks(tokens, GPT_OSS_20B, rows)[0]
    idle = found.of_rows * (1 - ceil(4 * min(1.0, used / rows)) / 4)
    loop = found.code.loop | {"caches": found.code.loop.get("caches", 0.0) - idle}
    return predict(launch, replace(found.code, loop=loop), tokens, card)


def rows(card: Card) -> list[list]:
    """A cell with two values: along the inputs / along the outputs."""
    known: dict[str, Compiled] = {}  # by the launch's label: several batches have the same kernel
    found = []
    for tokens in TOKENS:
        both = [experts(tokens, card.capability, along) for along in DIRECTIONS]
        for product in PRODUCTS:
            cells, predictions = [], []
            for named in both:
                launch = named[product]
                if launch.label not in known:
                    known[launch.label] = compiled(launch, card.capability)
                cells.append(known[launch.label].cells)
                predictions.append(predicted(known[launch.label], launch, tokens, card))
            pairs = [" / ".join(pair) for pair in zip(*cells, strict=True)]
            inputs, outputs = (each.us for each in predictions)
            us = [f"{inputs:.1f} / {outputs:.1f}", f"{inputs / outputs:.2f}"]
            found.append([card.name, tokens, product, *pairs, *us, " / ".join(each.limit for each in predictions)])
    return found


def main() -> None:
    print(f"Triton {triton.__version__}, bfloat16, gpt-oss-20b. In each cell: along the inputs / along the outputs.\n")
    for card in (RTX_3090, H200):
        print(markdown(COLUMNS, rows(card)), flush=True)


if __name__ == "__main__":
    main()

"""What is measured: one cell of the tables, by one engine at a time. Imports neither torch nor vLLM."""

import argparse
import re
from dataclasses import dataclass

ADAPTERS = 8  # that an engine with LoRA holds
DECODE, PREFILL = "decode", "prefill"
BATCHED_TOKENS = 8192  # that vLLM computes in one step, at most
WARM_STEPS = 8  # not counted: to reach the steady state, in which vLLM prepares a step while another runs


@dataclass(frozen=True)
class Cell:
    """Decode steps of `batch` requests, each after a prompt of `tokens`; or the prefill of one prompt of `tokens`.

    adapters: how many adapters the requests are spread over. 0: requests on the base.
    """

    kind: str
    tokens: int
    batch: int = 1
    adapters: int = 0

    @property
    def name(self) -> str:
        """As results and tables call it: "decode 8x128", "prefill 2048"."""
        if self.kind == PREFILL:
            return f"{PREFILL} {self.tokens}"
        adapters = f", {self.adapters} adapter{'s' if self.adapters > 1 else ''}" if self.adapters else ""
        return f"{DECODE} {self.batch}x{self.tokens}{adapters}"

    def output_tokens(self, steps: int) -> int:
        """Of each request, so that `steps` decode steps of all of them can be measured.

        While later prompts are read, the first requests decode already.
        """
        if self.kind == PREFILL:
            return 1
        prompts = 2 * (self.batch * self.tokens // BATCHED_TOKENS + 2)
        return prompts + WARM_STEPS + steps

    def length(self, steps: int) -> int:
        """Tokens of a request at its end."""
        return self.tokens + self.output_tokens(steps)


def decode_cell(text: str) -> Cell:
    """For argparse: "8x128" is eight requests after prompts of 128 tokens."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxTOKENS, such as 8x128")
    return Cell(DECODE, int(found[2]), int(found[1]))


DECODE_CELLS = tuple(
    Cell(DECODE, tokens, batch) for batch, tokens in ((1, 128), (8, 128), (32, 128), (64, 128), (128, 128))
)
LONG_CELLS = (Cell(DECODE, 8192, 1),)
PREFILL_CELLS = (Cell(PREFILL, 2048), Cell(PREFILL, 8192))


def adapter_cells(decode: list[Cell]) -> list[Cell]:
    """For an engine with LoRA: those of `decode` again with all requests on one adapter, and the largest over ADAPTERS."""
    largest = max(decode, key=lambda cell: cell.batch)
    return [
        *(Cell(DECODE, cell.tokens, cell.batch, 1) for cell in decode),
        Cell(DECODE, largest.tokens, largest.batch, ADAPTERS),
    ]

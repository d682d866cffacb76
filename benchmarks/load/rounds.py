"""The quiet server, then rounds of the crowd, then the quiet server again."""

import asyncio
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.clients import Outcome, crowd, one_by_one
from benchmarks.load.questions import Question, clear, random_prompts
from benchmarks.load.watching import (
    CACHE,
    PREEMPTIONS,
    PREFIX_HITS,
    RUN_TO_END,
    RUNNING,
    WAITING,
    Peaks,
    drained,
    resident_bytes,
)
from benchmarks.vllm_server import Server, Start, server_process
from gptoss_nf4.source.interface import Source

NEW_TOKENS = 24
CANDIDATES = 24  # prompts; about half have large margins
# 128 blocks of 32 tokens hold a fifth of what 64 requests want. 96 tokens are less than a step of all and a prompt.
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 96,
    "block_size": 32,
    "num_gpu_blocks_override": 128,
    "enforce_eager": True,
}
# The first crowd costs memory that the processes keep: 44 MiB in 8 s, 78 in 60 s, of 1.9 GiB. From then on the level stays:
# 12 MiB in another 8 s, 7 and 1 in two more rounds of 60 s, each of 700 to 1100 requests.
MOST_GROWTH = 24 << 20


@dataclass(frozen=True)
class Round:
    """One round: what became of its requests, and the server after it, once nothing ran any more or 30 s were over."""

    outcome: Outcome
    most_running: int
    most_waiting: int
    run_to_end: int
    preempted: int
    prefix_tokens: int
    left_running: int
    left_waiting: int
    left_cache: float
    resident_bytes: int


@dataclass(frozen=True)
class Report:
    """All rounds. `resident_bytes` is that of the quiet server, `changed` the answers that were others afterwards."""

    questions: int
    resident_bytes: int
    rounds: list[Round]
    changed: int

    def faults(self) -> Iterator[str]:
        """What must not be, a line each."""
        for number, each in enumerate(self.rounds, 1):
            for kind, lines in (("wrong", each.outcome.wrong), ("lost", each.outcome.lost)):
                if lines:
                    yield f"round {number}: {len(lines)} answers {kind}, such as {lines[0]}"
            if each.left_running or each.left_waiting or each.left_cache:
                yield (
                    f"round {number}: {each.left_running} requests run and {each.left_waiting} wait for nobody, "
                    f"{each.left_cache:.0%} of the KV cache is in use"
                )
        for number, (before, after) in enumerate(zip(self.rounds, self.rounds[1:], strict=False), 2):
            grown = after.resident_bytes - before.resident_bytes
            if grown > MOST_GROWTH:
                yield f"round {number}: the server's memory grew by {grown / 2**20:.1f} MiB"
        if self.changed:
            yield f"{self.changed} answers of the quiet server are others than before"


def under_load(
    source: Source,
    checkpoint: Path,
    log: Path,
    clients: int,
    seconds: float,
    rounds: int,
    start: Start = subprocess.Popen,
) -> Report:
    """Start a server of `checkpoint`, converted from `source`, and let `clients` ask for `seconds`, `rounds` times.

    ValueError where the quiet server itself is wrong, or where no question has large margins.
    """
    with server_process(checkpoint, ENGINE, log, start) as server:
        model, prompts = str(checkpoint), random_prompts(CANDIDATES, source.dimensions.vocabulary)
        questions = clear(source, asyncio.run(one_by_one(server.url, model, prompts, NEW_TOKENS)))
        if not questions:
            raise ValueError(f"none of {CANDIDATES} questions has large margins")
        quiet = resident_bytes(server.pid)
        made = [one_round(server, model, questions, clients, seconds) for _ in range(rounds)]
        again = asyncio.run(one_by_one(server.url, model, [each.prompt for each in questions], NEW_TOKENS))
        return Report(len(questions), quiet, made, sum(a != b for a, b in zip(again, questions, strict=True)))


def one_round(server: Server, model: str, questions: list[Question], clients: int, seconds: float) -> Round:
    before = drained(server.url)
    with Peaks(server.url) as peaks:
        outcome = asyncio.run(crowd(server.url, model, questions, clients, seconds))
    after = drained(server.url)
    ended, preempted, hits = (int(after[name] - before[name]) for name in (RUN_TO_END, PREEMPTIONS, PREFIX_HITS))
    return Round(
        outcome=outcome,
        most_running=peaks.running,
        most_waiting=peaks.waiting,
        run_to_end=ended,
        preempted=preempted,
        prefix_tokens=hits,
        left_running=int(after[RUNNING]),
        left_waiting=int(after[WAITING]),
        left_cache=after[CACHE],
        resident_bytes=resident_bytes(server.pid),
    )

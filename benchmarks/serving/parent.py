"""The parent: makes the weights, starts the contenders' engines, and lets one at a time measure."""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.serving.jobs import CONTENDERS, Job

CONTENDER = [sys.executable, "-m", "benchmarks.serving.contender"]


def prepare(jobs: list[Job]) -> dict[str, Any]:
    """Make the weights that `jobs` need where they are missing; returns the GPU's name and the rate of reading them."""
    import torch

    from benchmarks import weights
    from benchmarks.serving import adapters

    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.serving: no NVIDIA GPU: got none, expected one with 24 GB; run it on such a machine")
    directory = jobs[0].directory
    for kind in sorted({CONTENDERS[job.contender].weights for job in jobs}):
        started = time.monotonic()
        weights.ensure(directory, kind, weights.GPT_OSS_20B, "cuda")
        print(f"weights {kind}: {time.monotonic() - started:.0f} s", flush=True)
    for job in jobs:
        if job.lora_rank:
            adapters.ensure(job.adapter, weights.GPT_OSS_20B, job.lora_rank)
    torch.cuda.empty_cache()
    read = read_rate(jobs[0].checkpoint)
    print(f"reading the files: {read:.1f} GB/s", flush=True)
    return {"gpu": torch.cuda.get_device_name(), "read_gb_per_second": read}


def read_rate(directory: Path) -> float:
    """GB/s of reading a checkpoint's files once, as they are cached now: what loading is measured against."""
    buffer, total, started = bytearray(1 << 24), 0, time.perf_counter()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started) / 1e9


def measure_all(groups: list[list[Job]], passes: int = 1) -> dict[str, dict]:
    """Results by name of job, without those that failed: medians over `passes`.

    The engines of a group start together. In each pass they measure in turn.
    """
    results: dict[str, dict] = {}
    for group in groups:
        engines = [Engine(job) for job in group]
        for engine in engines:  # all of them first: nobody starts while one measures
            engine.wait_until_ready()
        found: dict[str, list[dict | None]] = {engine.job.name: [] for engine in engines}
        for _ in range(passes):
            for engine in engines:
                name, result = engine.job.name, engine.measure()
                found[name].append(result)
                print(f"{name}: {f'failed, see {engine.job.log}' if result is None else json.dumps(result)}", flush=True)
        results |= {name: medians(each) for name, each in found.items() if None not in each}
        for engine in engines:
            engine.end()
    return results


def medians(values: list[Any]) -> Any:
    """Of objects of the same structure: one of its medians."""
    if isinstance(values[0], dict):
        return {key: medians([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [medians(list(each)) for each in zip(*values, strict=True)]
    return values[0] if None in values else statistics.median(values)


class Engine:
    """A contender's process. It says READY, waits for GO, and says RESULT with a JSON object, each on a line."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ready = False
        # In-process engine: the router can be watched, and a contender can exchange the plugin's method.
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
        with job.log.open("w") as log:
            self._process = subprocess.Popen(
                [*CONTENDER, job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self._process.stdin is not None  # pipes, as asked for
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def wait_until_ready(self) -> None:
        self.ready = self._wait_for("READY") is not None

    def measure(self) -> dict | None:
        """Let it measure; None if it failed, now or before."""
        if not self.ready:
            return None
        try:
            self._to.write("GO\n")
            self._to.flush()
            result = self._wait_for("RESULT ")
        except BrokenPipeError:  # it has ended since it last said something
            result = None
        self.ready = result is not None
        return None if result is None else json.loads(result)

    def end(self) -> None:
        """It ends when nothing more can come from here."""
        with suppress(BrokenPipeError):  # a GO that it did not read is still to be written
            self._to.close()
        self._process.wait()

    def _wait_for(self, start: str) -> str | None:
        """What follows `start` in the first line that begins so; None if the process ends before."""
        for line in self._from:
            if line.startswith(start):
                return line.removeprefix(start)
        return None

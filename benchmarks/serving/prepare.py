"""What has to be there before any engine starts: weights, adapters, and what the results are compared with."""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.serving.jobs import CONTENDERS, Job


def prepare(jobs: list[Job]) -> dict[str, Any]:
    """Make what `jobs` need where it is missing. Returns what is true of the machine and the run as a whole."""
    import torch

    from benchmarks import weights
    from benchmarks.bandwidth import read_bandwidth
    from benchmarks.serving import adapters

    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.serving: no NVIDIA GPU: got none, expected one with 24 GB; run it on such a machine")
    directory = jobs[0].directory
    kinds = sorted({CONTENDERS[job.contender].weights for job in jobs})
    for kind in kinds:
        started = time.monotonic()
        weights.ensure(directory, kind, weights.GPT_OSS_20B, "cuda")
        print(f"weights {kind}: {time.monotonic() - started:.0f} s", flush=True)
    for job in jobs:
        if job.lora_rank:
            adapters.ensure(job.adapter, weights.GPT_OSS_20B, job.lora_rank)
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("vllm", "torch", "triton")},
        "read_tb_per_second": read_bandwidth(),
        "files_gb_per_second": {kind: read_rate(directory / kind) for kind in kinds},
    }
    torch.cuda.empty_cache()
    return facts


def read_rate(directory: Path) -> float:
    """GB/s of reading a checkpoint's files once, as they are cached now: what loading is measured against."""
    buffer, total, started = bytearray(1 << 24), 0, time.perf_counter()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started) / 1e9

"""One contender: an engine that gets ready and then measures what it is told. `engine.Engine` starts it and talks to it.

It writes READY with what the start has told, and RESULT for each line that it reads, each with a JSON object on a line.
"""

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from unittest import mock

from benchmarks.serving import adapters
from benchmarks.serving.cells import ADAPTERS, BATCHED_TOKENS, Cell
from benchmarks.serving.jobs import CONTENDERS, Job

if TYPE_CHECKING:
    from vllm import LLM

LOADING = "loading.lock"  # whoever holds it loads its weights


def main() -> None:
    job = Job.from_json(sys.argv[1])
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout too, which is the way to the parent: let it write to the log instead
    started = time.monotonic()
    with loading_alone(job.directory / LOADING):
        llm = engine(job)
    facts = {"ready_seconds": time.monotonic() - started} | read_log(job.log.read_text(), job.checkpoint)
    print("READY " + json.dumps(facts), file=parent, flush=True)
    answer_all(llm, job, sys.stdin, parent, compilations())
    # After the end of file, once all of the group have measured: GPU memory stays taken as long.


def answer_all(llm: "LLM", job: Job, questions: TextIO, answers: TextIO, compiled: list[str]) -> None:
    """Answer each line of `questions`: {"do": a key of DO, and its arguments}."""
    for line in questions:
        question = json.loads(line)
        do = DO[question.pop("do")]
        print("RESULT " + json.dumps(do(llm, job, compiled, **question)), file=answers, flush=True)


def engine(job: Job) -> "LLM":
    import torch
    from vllm import LLM

    contender = CONTENDERS[job.contender]
    if contender.dequantize_all:
        from gptoss_nf4.vllm.moe import Nf4MoEMethod

        mock.patch.object(Nf4MoEMethod, "packs", return_value=False).start()  # as in float32 on a GPU
    lora = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": job.lora_rank} if job.lora_rank else {}
    total = torch.cuda.get_device_properties(0).total_memory
    return LLM(
        str(job.checkpoint),
        dtype=contender.dtype,
        skip_tokenizer_init=True,
        max_model_len=job.max_model_len,
        max_num_seqs=job.max_num_seqs,
        max_num_batched_tokens=BATCHED_TOKENS,
        # With a cache of fixed size vLLM asks for this much at its start only, when others have taken theirs already.
        gpu_memory_utilization=(job.kv_gib or job.gib) * 2**30 / total,
        attention_config={"backend": "TRITON_ATTN"},
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": graph_sizes(job.max_num_seqs)},
        kv_cache_memory_bytes=int(job.kv_gib * 2**30) if job.kv_gib else None,
        **contender.engine_args,
        **lora,
    )


def graph_sizes(largest: int) -> list[int]:
    """Tokens of the decode steps that are captured as CUDA graphs: powers of two, and `largest`."""
    return sorted({1 << power for power in range(largest.bit_length())} | {largest})


@contextmanager
def loading_alone(lock: Path) -> Iterator[None]:
    """vLLM reads weights only when no other contender does. Logs how long loading takes in all, without the waiting."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_model, load_weights = DefaultModelLoader.load_model, DefaultModelLoader.load_weights
    waited = 0.0

    def load_weights_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal waited
        started = time.perf_counter()
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = time.perf_counter() - started
            return load_weights(self, *args, **kwargs)

    def load_model_and_log(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        model = load_model(self, *args, **kwargs)
        print(WHOLE_LOAD.format(time.perf_counter() - started - waited), file=sys.stderr, flush=True)
        return model

    with (
        mock.patch.object(DefaultModelLoader, "load_weights", load_weights_alone),
        mock.patch.object(DefaultModelLoader, "load_model", load_model_and_log),
    ):
        yield


WHOLE_LOAD = "benchmarks.serving: creating the model, reading and preparing its weights took {:.3f} seconds"


def read_log(text: str, checkpoint: Path) -> dict[str, float | None]:
    """What vLLM 0.32, and `loading_alone`, log of loading and of memory; None for a line that is not there."""

    def number(pattern: str) -> float | None:
        found = re.search(pattern, text)
        return float(found[1].replace(",", "")) if found else None

    load_seconds = number(r"Loading weights took ([\d.]+) seconds")
    prepared_seconds = number(WHOLE_LOAD.replace("{:.3f}", r"([\d.]+)"))
    tokens = number(r"KV cache size: ([\d,]+) tokens")
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return {
        "load_seconds": load_seconds,
        "load_gb_per_second": size / load_seconds / 1e9 if load_seconds else None,
        "prepared_gb_per_second": size / prepared_seconds / 1e9 if prepared_seconds else None,
        "model_gib": number(r"Model loading took ([\d.]+) GiB"),
        "kv_cache_tokens": None if tokens is None else int(tokens),
        "full_length_requests": number(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x"),
    }


def compilations() -> list[str]:
    """Names of the Triton kernels that are compiled, or read from Triton's cache, from now on. The list grows."""
    from triton import knobs

    found: list[str] = []
    before = knobs.runtime.jit_post_compile_hook  # vLLM's own, which warns

    def note(**event: Any) -> Any:
        found.append(event["fn"].name)
        return before(**event) if before else None

    knobs.runtime.jit_post_compile_hook = note
    return found


def wall(llm: "LLM", job: Job, compiled: list[str], cell: dict, steps: int) -> dict[str, Any]:
    """One value of a cell, by the wall clock. `steps`: of decoding."""
    from benchmarks.serving.measuring import wall_ms

    which = Cell(**cell)
    return {"ms": wall_ms(llm, which, steps, adapters.requests(job, which.adapters))}


def device(llm: "LLM", job: Job, compiled: list[str], cell: dict) -> dict[str, Any]:
    """A cell's time on the device."""
    from benchmarks.serving.measuring import device_us

    which = Cell(**cell)
    whole, kernels = device_us(llm, which, adapters.requests(job, which.adapters))
    return {"device_ms": whole / 1e3, "kernels_us": kernels}


def state(llm: "LLM", job: Job, compiled: list[str]) -> dict[str, Any]:
    """What has come of it so far: compilations, memory, and the size of its experts."""
    import torch

    from benchmarks.serving.routing import expert_bytes

    return {
        "compiled_after_ready": sorted(compiled),
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        "expert_bytes": expert_bytes(llm),
    }


def routing(llm: "LLM", job: Job, compiled: list[str], batches: list[int]) -> dict[str, Any]:
    """Distinct experts by batch. Asked for last: watching the router leaves its mark on the engine."""
    from benchmarks.serving.routing import ROUTED_TOKENS, chosen_experts, distinct_experts

    chosen = chosen_experts(llm)
    found = distinct_experts(chosen, [batch for batch in batches if batch < ROUTED_TOKENS]) if chosen else None
    return {"distinct_experts": found}


DO: dict[str, Callable[..., dict[str, Any]]] = {"wall": wall, "state": state, "device": device, "routing": routing}


if __name__ == "__main__":
    main()

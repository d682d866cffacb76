"""One contender: an engine that gets ready, waits for its turn, and measures. `parent.Engine` starts it and talks to it."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.serving import adapters
from benchmarks.serving.jobs import ADAPTERS, BATCHES, CONTENDERS, OURS, PREFILLS, Job

if TYPE_CHECKING:
    import torch
    from vllm import LLM

GRAPH_SIZES = [1, 2, 4, 8, 16, 32]  # tokens of a decode step, captured as CUDA graphs
ROUTED_TOKENS = 256  # beyond the graphs' sizes: within a graph no function of ours is called to watch the router
LARGEST_KERNELS = 25
WHOLE = "the device"  # its time, beside those of kernels


def main() -> None:
    job = Job.from_json(sys.argv[1])
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout too, which is the way to the parent: let it write to the log instead
    started = time.monotonic()
    llm = engine(job)
    result = {"ready_seconds": time.monotonic() - started} | read_log(job.log.read_text(), job.checkpoint)
    print("READY", file=parent, flush=True)
    # Until the end of file, once all of the group have measured: GPU memory stays taken as long.
    while sys.stdin.readline() == "GO\n":
        print("RESULT " + json.dumps(result | measure(llm, job)), file=parent, flush=True)


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
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=job.max_model_len,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=job.gib * 2**30 / total,
        attention_config={"backend": "TRITON_ATTN"},
        enable_prefix_caching=False,
        disable_log_stats=False,
        compilation_config={"cudagraph_capture_sizes": GRAPH_SIZES},
        kv_cache_memory_bytes=int(job.kv_gib * 2**30) if job.kv_gib else None,
        **contender.engine_args,
        **lora,
    )


def read_log(text: str, checkpoint: Path) -> dict[str, float | None]:
    """What vLLM 0.32 logs of loading and of the KV cache; None for a line that is not there."""

    def number(pattern: str) -> float | None:
        found = re.search(pattern, text)
        return float(found[1].replace(",", "")) if found else None

    load_seconds = number(r"Loading weights took ([\d.]+) seconds")
    tokens = number(r"KV cache size: ([\d,]+) tokens")
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return {
        "load_seconds": load_seconds,
        "load_gb_per_second": size / load_seconds / 1e9 if load_seconds else None,
        "kv_cache_tokens": None if tokens is None else int(tokens),
        "full_length_requests": number(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x"),
    }


def measure(llm: "LLM", job: Job) -> dict[str, Any]:
    from gptoss_nf4.engine.measure import generate_seconds, measure_batch, measure_prefill, random_prompts

    vocabulary = llm.model_config.get_vocab_size()
    result: dict[str, Any] = {
        "batches": [measure_batch(llm, batch, 128, 257, job.rounds, vocabulary) for batch in BATCHES],
        "prefill_ms": {tokens: measure_prefill(llm, tokens, job.rounds, vocabulary) for tokens in PREFILLS},
    }
    if job.lora_rank:
        result["adapters"] = adapters.measure(llm, job, vocabulary)
    if job.long_prompt and job.contender == OURS:
        prompt = random_prompts(1, job.max_model_len - 16, vocabulary)
        result["full_length_prompt_seconds"] = generate_seconds(llm, prompt, 16)
    if job.profile:
        asked = adapters.requests(job)[:1] if job.lora_rank else [None]
        result["kernels_us_per_step"] = {batch: kernel_times(llm, batch, vocabulary, asked * batch) for batch in BATCHES}
    chosen = chosen_experts(llm, vocabulary)
    result["distinct_experts"] = distinct_experts(chosen) if chosen else None
    return result


def chosen_experts(llm: "LLM", vocabulary: int) -> "list[torch.Tensor]":
    """The router's choices for random tokens, [ROUTED_TOKENS or more, k] for each layer.

    None at all where the backend routes within its own kernel. It sees the same router and the same kind of tokens.
    """
    from gptoss_nf4.engine.measure import generate_seconds, random_prompts

    chosen: list[torch.Tensor] = []

    def watch(model: Any) -> bool:
        runners = [module for module in model.modules() if type(module).__name__ == "MoERunner"]
        routers: list[Any] = [getattr(runner, "router", None) for runner in runners]
        if not routers or not all(hasattr(router, "set_capture_fn") for router in routers):
            return False
        for router in routers:
            router.set_capture_fn(lambda ids: chosen.append(ids.detach().cpu()))
        return True

    if not all(llm.apply_model(watch)):
        return []
    generate_seconds(llm, random_prompts(1, ROUTED_TOKENS, vocabulary), 1)
    return [ids for ids in chosen if len(ids) >= ROUTED_TOKENS]  # the others are warming up


def distinct_experts(chosen: "list[torch.Tensor]") -> dict[int, float]:
    """Mean number of distinct experts in a batch of each size, from choices [ROUTED_TOKENS or more, k] of each layer."""

    def mean(batch: int) -> float:
        groups = [ids[start : start + batch] for ids in chosen for start in range(0, ROUTED_TOKENS, batch)]
        return sum(len(group.unique()) for group in groups) / len(groups)

    return {batch: mean(batch) for batch in BATCHES}


def kernel_times(llm: "LLM", batch: int, vocabulary: int, asked: list | None = None, steps: int = 32) -> dict[str, float]:
    """Microseconds per decode step: those of the device as a whole, and those of the largest kernels. Prefill is taken off.

    Kernels may run side by side, so their times can add up to more than the whole. Short gaps between them belong to it.

    Args:
        asked: a LoRARequest, or None, for each prompt.
    """
    from torch.profiler import ProfilerActivity, profile

    from gptoss_nf4.engine.measure import generate, random_prompts

    def times(output_tokens: int) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            generate(llm, random_prompts(batch, 128, vocabulary), output_tokens, asked)
        ranges = [event.time_range for event in trace.events() if event.self_device_time_total]
        each = {event.key: event.self_device_time_total for event in trace.key_averages()}
        return {WHOLE: busy([(span.start, span.end) for span in ranges])} | each

    first, whole = times(1), times(1 + steps)
    per_step = {name: (time - first.get(name, 0)) / steps for name, time in whole.items()}
    return dict(sorted(per_step.items(), key=lambda item: item[1], reverse=True)[: LARGEST_KERNELS + 1])


def busy(spans: list[tuple[float, float]], gap: float = 10.0) -> float:
    """Length of the union of `spans` (start, end), with the gaps of up to `gap` between them."""
    total, reached = 0.0, None
    for start, end in sorted(spans):
        begin = start if reached is None or start - reached > gap else reached
        total += max(0.0, end - begin)
        reached = end if reached is None else max(reached, end)
    return total


if __name__ == "__main__":
    main()

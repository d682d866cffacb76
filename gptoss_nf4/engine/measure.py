"""Measuring vLLM in this process: the benchmark stage and `python -m benchmarks.serving` both use these functions.

Prompts are random token numbers, fresh ones each time: no text, no tokenizer, and a mixture of experts that sees
different tokens.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from vllm import LLM

SAMPLE_SECONDS = 0.2


class PeakMemory(threading.Thread):
    """The largest memory of a process and its children: resident bytes on the host, and used bytes on the GPU."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.host_bytes = 0
        self.gpu_bytes: int | None = None
        self._ended = threading.Event()
        self._gpu = _gpu_handle()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.host_bytes = max(self.host_bytes, _resident_bytes(self.process))
            if self._gpu:
                self.gpu_bytes = max(self.gpu_bytes or 0, self._gpu())

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _resident_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def _gpu_handle() -> Callable[[], int] | None:
    """A function that reads the used bytes of GPU 0, or None where there is no NVIDIA GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def random_prompts(count: int, tokens: int, vocabulary: int) -> list[dict]:
    return [{"prompt_token_ids": random.choices(range(vocabulary), k=tokens)} for _ in range(count)]


def generate(llm: "LLM", prompts: list[dict], output_tokens: int, adapters: list | None = None) -> list:
    """vLLM's outputs with every prompt continued by exactly `output_tokens` tokens. adapters: a LoRARequest a prompt.

    Sampled, not greedy: a model of random weights, given its likeliest tokens, soon repeats a few, and a batch of them
    would use a few experts.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
    produced = [len(output.outputs[0].token_ids) for output in outputs]
    if produced != [output_tokens] * len(prompts):
        raise RuntimeError(f"vLLM produced {produced} tokens, not {output_tokens} for each of {len(prompts)} prompts")
    return outputs


def generate_seconds(llm: "LLM", prompts: list[dict], output_tokens: int) -> float:
    """Seconds until every prompt is continued by exactly `output_tokens` tokens."""
    started = time.perf_counter()
    generate(llm, prompts, output_tokens)
    return time.perf_counter() - started


def measure_batch(
    llm: "LLM",
    batch: int,
    input_tokens: int,
    output_tokens: int,
    rounds: int,
    vocabulary: int,
    adapters: list | None = None,
) -> dict:
    """One batch size, after one round that is not counted; medians over requests, then over `rounds`.

    By vLLM's own clock, so the engine has to be made with disable_log_stats=False: a step is the time from a request's
    first token to its last, divided by the tokens between.
    """
    firsts, steps = [], []
    for _ in range(rounds + 1):
        outputs = generate(llm, random_prompts(batch, input_tokens, vocabulary), output_tokens, adapters)
        stats = [output.metrics for output in outputs]
        firsts.append(statistics.median(s.first_token_latency for s in stats))
        steps.append(statistics.median((s.last_token_ts - s.first_token_ts) / (output_tokens - 1) for s in stats))
    step = statistics.median(steps[1:])
    return {
        "batch": batch,
        "output_tokens_per_second": batch / step,
        "median_time_to_first_token_ms": 1e3 * statistics.median(firsts[1:]),
        "median_time_per_output_token_ms": 1e3 * step,
    }


def measure_prefill(llm: "LLM", tokens: int, rounds: int, vocabulary: int) -> float:
    """Milliseconds from a prompt of `tokens` to its first token: median over `rounds`, after one not counted."""
    return 1e3 * statistics.median(
        [generate_seconds(llm, random_prompts(1, tokens, vocabulary), 1) for _ in range(rounds + 1)][1:]
    )

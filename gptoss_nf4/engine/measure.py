"""Measuring vLLM in this process, for stage benchmark and for `python -m benchmarks.serving`.

Prompts are random token ids, drawn anew each time. So no tokenizer is needed, and the tokens spread over the experts.
"""

import random
import statistics
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from vllm import LLM

SAMPLE_SECONDS = 0.2  # between two looks at the memory


class PeakMemory(threading.Thread):
    """Samples memory until `stop`, and keeps the largest values.

    `host_bytes`: resident bytes of process `pid` and its children. `gpu_bytes`: used bytes of GPU 0, whoever uses them;
    None without an NVIDIA GPU.
    """

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
        """End sampling. The values stay."""
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
    """A function that reads the used bytes of GPU 0. None where there is no NVIDIA GPU."""
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
    """`count` prompts of `tokens` random token ids below `vocabulary`, as vLLM takes them."""
    return [{"prompt_token_ids": random.choices(range(vocabulary), k=tokens)} for _ in range(count)]


def generate(llm: "LLM", prompts: list[dict], output_tokens: int) -> list:
    """Continue every prompt by exactly `output_tokens` tokens and return vLLM's outputs.

    Tokens are sampled, not greedy. A model of random weights that always takes the likeliest token soon repeats a few of
    them, and they would use few experts. RuntimeError where vLLM produced another number of tokens.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    produced = [len(output.outputs[0].token_ids) for output in outputs]
    if produced != [output_tokens] * len(prompts):
        raise RuntimeError(f"vLLM produced {produced} tokens, not {output_tokens} for each of {len(prompts)} prompts")
    return outputs


def measure_batch(llm: "LLM", batch: int, input_tokens: int, output_tokens: int, rounds: int, vocabulary: int) -> dict:
    """Measure one batch size: tokens per second, time to first token and time per output token.

    Each is the median over the requests of a round, then over `rounds` rounds. A first round is not counted. The times are
    vLLM's own, so the engine needs disable_log_stats=False. The time per output token is that from a request's first token
    to its last, divided by the number of steps between, so `output_tokens` is 2 or more.
    """
    firsts, steps = [], []
    for _ in range(rounds + 1):
        outputs = generate(llm, random_prompts(batch, input_tokens, vocabulary), output_tokens)
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

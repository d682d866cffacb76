"""What generating on a CPU will take, so that a stage can leave it out instead of running for hours or out of memory."""

import math
from dataclasses import dataclass

from gptoss_nf4.format.dimensions import Dimensions

# Of one core, in float16, which is slower than float32: weights dequantized and products summed in a second. From vLLM on
# two layers of the 20b's dimensions, two cores: 7.7 s for 122 tokens of prompts, 0.35 s for each token of 4 requests.
DEQUANTIZED, PRODUCTS = 3.0e9, 7.2e9
START_SECONDS = 40.0  # importing vLLM and starting its engine
GIB = 1 << 30
OTHER_BYTES = 3 * GIB  # vLLM's processes without weights and KV cache
PROMPT_TOKENS_AT_ONCE = 2048  # vLLM's smallest default of max_num_batched_tokens


@dataclass(frozen=True)
class Forecast:
    """Seconds, and bytes of memory at the peak."""

    seconds: float
    memory_bytes: int

    def too_much(self, free_bytes: int, max_minutes: float) -> str | None:
        """Why vLLM is left out where `free_bytes` of memory are free. None where it can run within `max_minutes`."""
        if self.memory_bytes > free_bytes:
            needed, free = self.memory_bytes / GIB, free_bytes / GIB
            return f"vLLM, which needs about {needed:.1f} GiB of memory; {free:.1f} are free"
        if self.seconds > 60 * max_minutes:
            return f"vLLM, which needs about {self.seconds / 60:.0f} minutes here; engine.max_minutes is {max_minutes}"
        return None


def forecast_on_cpu(
    d: Dimensions, weight_bytes: int, kv_cache_bytes: int, prompts: list[str], new_tokens: int, cores: int
) -> Forecast:
    """What `engine.generate` takes for `new_tokens` after each of `prompts`, at once, on a checkpoint of this plugin.

    All experts are dequantized for a prompt, and for each further token those that a batch uses: at most all, and at most
    `experts_per_token` for each request. A prompt has at most as many tokens as UTF-8 bytes.
    """
    prompt_tokens = sum(len(prompt.encode()) for prompt in prompts)
    attention, expert = d.hidden * 2 * (d.q_rows + d.kv_rows), 3 * d.hidden * d.intermediate
    used = min(d.experts, len(prompts) * d.experts_per_token)
    prefills = math.ceil(prompt_tokens / PROMPT_TOKENS_AT_ONCE)
    experts = prefills * d.experts + new_tokens * used
    dequantized = d.layers * (experts * expert + (prefills + new_tokens) * attention)
    by_token = d.layers * (d.experts_per_token * expert + attention) + d.vocabulary * d.hidden
    products = (prompt_tokens + new_tokens * len(prompts)) * by_token
    seconds = START_SECONDS + (dequantized / DEQUANTIZED + products / PRODUCTS) / cores
    return Forecast(seconds, weight_bytes + kv_cache_bytes + OTHER_BYTES)

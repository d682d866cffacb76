"""Measuring one cell within a contender's process: by the wall clock, and by the profiler on the device."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.serving.cells import PREFILL, WARM_STEPS, Cell

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

PROFILED_STEPS = 8
LARGEST_KERNELS = 25
Adapters = list["LoRARequest"]


def wall_ms(llm: "LLM", cell: Cell, steps: int, adapters: Adapters) -> float:
    """Milliseconds of a decode step, the mean of `steps`; or of a prefill, up to its first token."""

    def timed(run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)

    if cell.kind == PREFILL:
        return timed(lambda: prefill(llm, cell))
    return decode(llm, cell, steps, adapters, timed) / steps


def device_us(llm: "LLM", cell: Cell, adapters: Adapters) -> tuple[float, dict[str, float]]:
    """Microseconds of the device for a decode step, or for a prefill: as a whole, and of the largest kernels by name.

    Kernels may run side by side, so their times can add up to more than the whole. Short gaps between them belong to it.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    def traced(run: Callable[[], None]) -> Any:
        torch.cuda.synchronize()  # vLLM is a step ahead of what it has returned: end that one, and below the last one
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
        return trace

    if cell.kind == PREFILL:
        trace, steps = traced(lambda: prefill(llm, cell)), 1
    else:
        trace, steps = decode(llm, cell, PROFILED_STEPS, adapters, traced), PROFILED_STEPS
    ranges = [event.time_range for event in trace.events() if event.self_device_time_total]
    whole = busy([(span.start, span.end) for span in ranges])
    each = {
        event.key: event.self_device_time_total / steps for event in trace.key_averages() if event.self_device_time_total
    }
    largest = sorted(each.items(), key=lambda item: item[1], reverse=True)[:LARGEST_KERNELS]
    return whole / steps, dict(largest)


def prefill(llm: "LLM", cell: Cell) -> None:
    """A prompt of random tokens, up to its first output token."""
    from gptoss_nf4.engine.measure import generate, random_prompts

    generate(llm, random_prompts(cell.batch, cell.tokens, llm.model_config.get_vocab_size()), 1)


def decode(llm: "LLM", cell: Cell, steps: int, adapters: Adapters, watch: Callable[[Callable[[], None]], Any]) -> Any:
    """What `watch` returns, called with a function that runs exactly `steps` decode steps of all of the cell's requests.

    All requests are past their prompts by then, and none ends. vLLM's engine is stepped by hand, as `LLM.generate` does it:
    the clock of a request would count steps in which others are still at their prompts.
    """
    from gptoss_nf4.engine.measure import random_prompts

    engine, vocabulary = llm.llm_engine, llm.model_config.get_vocab_size()
    sampling = _sampling(cell.output_tokens(steps))
    asked = [adapters[place % len(adapters)] if adapters else None for place in range(cell.batch)]
    for number, prompt in enumerate(random_prompts(cell.batch, cell.tokens, vocabulary)):
        engine.add_request(f"{time.monotonic_ns()}-{number}", prompt, sampling, lora_request=asked[number])
    while any(state.is_prefilling for state in engine.output_processor.request_states.values()):
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()

    def run() -> None:
        for _ in range(steps):
            engine.step()

    result = watch(run)
    running = llm.llm_engine.engine_core.engine_core.scheduler.running
    if len(running) != cell.batch or any(request.num_preemptions for request in running):
        raise RuntimeError(f"{cell.name}: not all requests ran in each step: the KV cache is too small for them")
    while engine.has_unfinished_requests():
        engine.step()
    return result


def _sampling(tokens: int) -> Any:
    """As `engine.measure.generate` samples, and why. Outputs at the end only, as `LLM.generate` asks for them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def busy(spans: list[tuple[float, float]], gap: float = 10.0) -> float:
    """Length of the union of `spans` (start, end), with the gaps of up to `gap` between them."""
    total, reached = 0.0, None
    for start, end in sorted(spans):
        begin = start if reached is None or start - reached > gap else reached
        total += max(0.0, end - begin)
        reached = end if reached is None else max(reached, end)
    return total

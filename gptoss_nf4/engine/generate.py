"""Greedy generation with vLLM in this process, with log-probabilities."""

from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_nf4.check.agreement import Generation
from gptoss_nf4.engine.serve import ServedAdapter, lora_rank

if TYPE_CHECKING:
    from vllm import RequestOutput

TOP = 20  # log-probabilities for each token; vLLM's default limit


def generate(checkpoint: Path, prompts: list[str], max_tokens: int, engine_args: dict) -> list[Generation]:
    """Load `checkpoint` with `vllm.LLM(**engine_args)` and continue each prompt greedily by exactly `max_tokens` tokens."""
    return _generate(checkpoint, [(prompt, None) for prompt in prompts], max_tokens, engine_args)


def generate_with(
    checkpoint: Path, adapter: ServedAdapter, prompts: list[str], max_tokens: int, engine_args: dict
) -> tuple[list[Generation], list[Generation]]:
    """`generate` by the base and by the adapter: (base's, adapter's). All requests of both are in one batch."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(adapter.name, 1, str(adapter.directory))
    lora_args = {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank([adapter])}
    requests = [(prompt, each) for prompt in prompts for each in (None, request)]
    made = _generate(checkpoint, requests, max_tokens, engine_args | lora_args)
    return made[0::2], made[1::2]


def _generate(checkpoint: Path, requests: list[tuple], max_tokens: int, engine_args: dict) -> list[Generation]:
    """Each request is (prompt, LoRARequest or None for the base)."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(checkpoint), **engine_args)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP)
    prompts, adapters = [prompt for prompt, _ in requests], [adapter for _, adapter in requests]
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters if any(adapters) else None)
    llm.llm_engine.engine_core.shutdown()  # otherwise the engine's process is killed at exit, with a warning
    return [generation(output) for output in outputs]


def generation(output: "RequestOutput") -> Generation:
    """vLLM's output of one request as a `Generation`."""
    completion = output.outputs[0]
    steps = [*output.prompt_logprobs, *completion.logprobs]
    return Generation(
        prompt=output.prompt,
        text=completion.text,
        token_ids=[*output.prompt_token_ids, *completion.token_ids],
        prompt_tokens=len(output.prompt_token_ids),
        logprobs=[{token: entry.logprob for token, entry in (step or {}).items()} for step in steps],
    )

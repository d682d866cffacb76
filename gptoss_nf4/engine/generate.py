"""Greedy generation with vLLM in this process, with log-probabilities."""

from pathlib import Path

from gptoss_nf4.check.agreement import Generation

TOP = 20  # vLLM's default limit on log-probabilities per token


def generate(checkpoint: Path, prompts: list[str], max_tokens: int, engine_args: dict) -> list[Generation]:
    """Load `checkpoint` with `vllm.LLM(**engine_args)` and continue every prompt by exactly `max_tokens` tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(checkpoint), **engine_args)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()  # otherwise the engine's process is killed at exit, with a warning
    return [generation(output) for output in outputs]


def generation(output) -> Generation:
    completion = output.outputs[0]
    steps = [*output.prompt_logprobs, *completion.logprobs]
    return Generation(
        prompt=output.prompt,
        text=completion.text,
        token_ids=[*output.prompt_token_ids, *completion.token_ids],
        prompt_tokens=len(output.prompt_token_ids),
        logprobs=[{token: entry.logprob for token, entry in (step or {}).items()} for step in steps],
    )

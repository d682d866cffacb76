"""vLLM's features on a converted checkpoint, in a process of its own: prints what the engine answered and did as JSON.

    python tests/features_in_vllm.py JOB    # JOB: a JSON file, see `run`

vLLM's engine runs within the process: it starts in 5 s instead of 20, and its scheduler can be watched.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Insecure: `experts_of_rank` travels to the workers as a pickle.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

from gptoss_nf4.engine.generate import TOP, generation

COUNTERS = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions")


def run(job: dict) -> dict:
    """`job`: checkpoint, engine (arguments of vLLM), max_tokens, and rounds, each a list of prompts that are asked at once.

    The first round asks for the prompts' log-probabilities too, for which vLLM computes all of a prompt. The others may
    take prefixes from the cache.

    `rounds` has for each its generations, the tokens that each request took from the cache, for each step of the scheduler
    the tokens of each request, by its place in the round, and how far vLLM's counters went. `ranks` has what
    `experts_of_rank` found in each worker.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(job["checkpoint"], disable_log_stats=False, **job["engine"])
    steps = watch_scheduler(llm)
    rounds = []
    for number, prompts in enumerate(job["rounds"]):
        sampling = SamplingParams(
            temperature=0,
            max_tokens=job["max_tokens"],
            ignore_eos=True,
            logprobs=TOP,
            prompt_logprobs=None if number else TOP,
        )
        steps.clear()
        before = counters(llm)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        after = counters(llm)
        rounds.append(
            {
                "generations": [asdict(generation(with_prompt_logprobs(output))) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                "steps": by_place(steps),
                "counters": {name: after[name] - before[name] for name in COUNTERS},
            }
        )
    return {"rounds": rounds, "ranks": llm.collective_rpc(experts_of_rank)}


def with_prompt_logprobs(output: Any) -> Any:
    """`output`, where its prompt's log-probabilities were not asked for with one None a token, as `generation` reads it."""
    output.prompt_logprobs = output.prompt_logprobs or [None] * len(output.prompt_token_ids)
    return output


def watch_scheduler(llm: Any) -> list[dict[str, int]]:
    """A list to which every step of the scheduler adds its tokens by request."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule: Callable = scheduler.schedule
    steps = []

    def watched(*arguments: Any, **named: Any) -> Any:
        output = schedule(*arguments, **named)
        if output.num_scheduled_tokens:
            steps.append(dict(output.num_scheduled_tokens))
        return output

    scheduler.schedule = watched
    return steps


def by_place(steps: list[dict[str, int]]) -> list[dict[int, int]]:
    """The steps with each request's place in the order of arrival instead of its name."""
    names = list(dict.fromkeys(name for step in steps for name in step))
    return [{names.index(name): tokens for name, tokens in step.items()} for step in steps]


def counters(llm: Any) -> dict[str, int]:
    return {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS}


def experts_of_rank(worker: Any) -> list[dict]:
    """For each layer of experts in this worker: the map from global to local numbers, and SHA-256 of each local expert's
    codes and biases as they lie in memory."""
    found = []
    for module in worker.model_runner.model.modules():
        if not hasattr(module, "w13_codes"):
            continue
        held = {}
        for name in ("w13_codes", "w2_codes", "w13_expert_bias", "w2_expert_bias"):
            held[name] = [hashlib.sha256(expert.numpy().tobytes()).hexdigest() for expert in getattr(module, name).data]
        expert_map = module.expert_map
        found.append({"rank": worker.rank, "map": None if expert_map is None else expert_map.tolist(), "held": held})
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    print("RESULT " + json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main()

"""Generates with vLLM, greedily, and prints token numbers as JSON. For an environment of its own: imports vLLM alone.

python generate_alone.py CHECKPOINT ENGINE_ARGUMENTS PROMPTS MAX_TOKENS, the middle two as JSON
"""

import importlib.util
import json
import sys
from importlib.metadata import requires, version

from packaging.requirements import Requirement

ABSENT = ("dvc", "hydra", "omegaconf", "pytest")


def unmet_requirements(distribution: str) -> list[str]:
    """What the installed `distribution` asks for without extras and does not find; PackageNotFoundError if absent."""
    asked = [Requirement(text) for text in requires(distribution) or []]
    plain = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [str(each) for each in plain if not each.specifier.contains(version(each.name), prereleases=True)]


def main() -> None:
    checkpoint, engine_args, prompts, max_tokens = sys.argv[1], *map(json.loads, sys.argv[2:])
    found = [name for name in ABSENT if importlib.util.find_spec(name)]
    unmet = unmet_requirements("gptoss-nf4")

    from vllm import LLM, SamplingParams

    llm = LLM(checkpoint, **engine_args)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    tokens = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    files = {name: sys.modules[name].__file__ for name in ("gptoss_nf4", "vllm", "bitsandbytes")}
    print("\n" + json.dumps({"tokens": tokens, "found": found, "unmet": unmet, "files": files}))


if __name__ == "__main__":
    main()

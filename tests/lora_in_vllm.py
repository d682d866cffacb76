"""vLLM with adapters, in a process of its own: base requests and several adapters in one batch; prints what came as JSON.

    python tests/lora_in_vllm.py JOB    # JOB: a JSON file, see `Job`

vLLM's engine runs within the process, which starts in 5 s instead of 20.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from gptoss_nf4.engine.generate import TOP, generation


def run(job: dict) -> list[dict]:
    """`job`: checkpoint, engine (arguments of vLLM), adapters (name -> directory), requests ([prompt, name or null]), and
    packed (whether to take the GPU's path, as `packed_in_vllm` does)."""
    if job["packed"]:
        from packed_in_vllm import use_the_gpus_path

        use_the_gpus_path()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(job["checkpoint"], enable_lora=True, **job["engine"])
    numbers = {name: LoRARequest(name, number, job["adapters"][name]) for number, name in enumerate(job["adapters"], 1)}
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP
    )
    prompts = [prompt for prompt, _ in job["requests"]]
    outputs = llm.generate(
        prompts, sampling, use_tqdm=False, lora_request=[numbers.get(name) for _, name in job["requests"]]
    )
    made = [generation(output) for output in outputs]
    return [{"token_ids": each.token_ids, "logprobs": each.logprobs} for each in made]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    print("RESULT " + json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main()

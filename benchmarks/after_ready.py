"""How many kernels are compiled after an engine is ready: none of ours. Needs a GPU.

    python -m benchmarks.after_ready [DIRECTORY] [--layers 2] [--rank 16]

Two engines one after the other, without adapters and with them, on random weights of gpt-oss-20b's widths. They get
prompts of unusual lengths, alone and in batches of unusual sizes. Every kernel that Triton compiles, or takes from its
cache on disk, is counted. Those of vLLM are counted apart. Ends with 1 if any of ours was.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables import markdown

if TYPE_CHECKING:
    from vllm import LLM

LENGTHS = (1, 2, 3, 5, 9, 17, 33, 63, 65, 67, 127, 129, 191, 193, 255, 257, 511, 513, 777, 1000, 1023, 1025, 2047, 3001)
BATCHES = (2, 3, 5, 7, 9, 13, 17, 23, 33, 47, 63)
MAX_TOKENS = 4
ADAPTERS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts what is compiled after an engine is ready")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("artifacts/after-ready"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--engine", choices=("base", "adapters"), help="only this one, in this process")
    asked = parser.parse_args()
    if asked.engine:
        sys.exit(count(asked.directory, asked.layers, asked.rank if asked.engine == "adapters" else None))
    failed = False
    for engine in ("base", "adapters"):
        command = [sys.executable, "-m", "benchmarks.after_ready", str(asked.directory), "--engine", engine]
        command += ["--layers", str(asked.layers), "--rank", str(asked.rank)]
        failed |= subprocess.run(command, check=False).returncode != 0
    sys.exit(failed)


def count(directory: Path, layers: int, rank: int | None) -> int:
    """Serve from one engine, print the table, and return whether one of our kernels was compiled after it was ready."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its compilations are seen
    import torch
    import triton

    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.after_ready: no GPU here: vLLM compiles no kernel without one")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from benchmarks import weights
    from benchmarks.serving import adapters

    d = replace(weights.GPT_OSS_20B, layers=layers)
    checkpoint = weights.ensure(directory, "nf4-bfloat16", d, "cuda")
    lora: dict[str, Any] = {}
    if rank:
        adapters.ensure(directory / f"adapter-{rank}-{layers}", d, rank)
        lora = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": rank}
    began = time.monotonic()
    llm = LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=2 << 30,  # not measured: others may use the GPU too
        enable_prefix_caching=False,
        attention_config={"backend": "TRITON_ATTN"},
        **lora,
    )
    ready = time.monotonic() - began
    watch = Watch()
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    numbers = range(1, ADAPTERS + 1) if rank else ()
    files = str(directory / f"adapter-{rank}-{layers}")
    asked_for = {"base": [None]}
    if rank:
        named = [LoRARequest(f"adapter-{number}", number, files) for number in numbers]
        asked_for |= {"adapter": named[:1], "mixed": [None, *named]}
    for name, choices in asked_for.items():
        watch.start(f"{name}, prompts alone")
        for length in LENGTHS:
            generate(llm, sampling, [length], choices[-1:])
        watch.start(f"{name}, batches")
        for size in BATCHES:
            generate(llm, sampling, [1 + 37 * number % 150 for number in range(size)], choices)
    name = torch.cuda.get_device_name()
    print(f"\nTriton {triton.__version__}, {name}, {'with' if rank else 'without'} adapters, ready after {ready:.0f} s\n")
    rows = [[phase, ours.total(), others.total(), ", ".join(ours | others)] for phase, ours, others in watch.seen]
    print(markdown(["", "ours", "vLLM's and others", "which"], rows), flush=True)
    return int(any(ours for _, ours, _ in watch.seen))


def generate(llm: "LLM", sampling: object, lengths: list[int], choices: list) -> None:
    prompts = [
        {"prompt_token_ids": [100 + (number + place) % 5000 for place in range(n)]} for number, n in enumerate(lengths)
    ]
    asked = [choices[number % len(choices)] for number in range(len(prompts))]
    llm.generate(prompts, sampling, lora_request=asked, use_tqdm=False)


class Watch:
    """Counts compilations by phase: (name, ours, others), each by the name of the kernel."""

    def __init__(self) -> None:
        import triton

        self.seen: list[tuple[str, Counter[str], Counter[str]]] = []
        runtime = triton.knobs.runtime
        vllms = runtime.jit_post_compile_hook  # which warns

        def note(**compiled: Any) -> None:
            function = compiled["fn"]
            _, ours, others = self.seen[-1]
            counted = ours if function.module.startswith("gptoss_nf4.") else others
            counted[f"{function.module.rpartition('.')[2]}.{function.name}"] += 1
            if vllms is not None:
                vllms(**compiled)

        runtime.jit_post_compile_hook = note

    def start(self, phase: str) -> None:
        """Count for `phase` from now on."""
        self.seen.append((phase, Counter(), Counter()))


if __name__ == "__main__":
    main()

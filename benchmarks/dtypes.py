"""How close each dtype comes to float32: vLLM against transformers, on embedded models.

    python -m benchmarks.dtypes [--models tiny_massive] [--engine '{"attention_config": {"backend": "TRITON_ATTN"}}']

A channel of the residual stream of `tiny_massive` passes float16's largest number, as in gpt-oss-120b; `tiny` has none.
Runs on the GPU if there is one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.tables import markdown
from gptoss_nf4.check import reference
from gptoss_nf4.check.agreement import Agreement, Generation
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.format.residual import AUTO, AUTO_FLOAT16
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.model import Model
from gptoss_nf4.storage.artifacts import Artifacts

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    "The capital of France is",
    "2 + 2 =",
    "Once upon a time, in a house by the sea, there lived an old clockmaker who",
]
RESULT = "generations: "
ENGINE = {"max_model_len": 256, "max_num_seqs": 4, "enforce_eager": not torch.cuda.is_available()}
# (dtype, residual_scale). The last case shows that scaling alone, with the eps that it changes, costs nothing.
CASES = (("float16", 1), ("float16", AUTO), ("bfloat16", AUTO), ("float32", 1), ("float32", AUTO_FLOAT16))
Case = tuple[str, object]
Agreements = dict[Case, Agreement | None]


def write_models(directory: Path) -> dict[str, Path]:
    embedded.write_checkpoint(directory / "tiny")
    embedded.write_checkpoint(directory / "tiny_massive", embedded.MASSIVE_DIMENSIONS, massive=True)
    return {name: directory / name for name in ("tiny", "tiny_massive")}


def converted(source: Path, directory: Path, case: Case) -> Path:
    dtype, scale = case
    artifacts = Artifacts(directory / f"{source.name}-{dtype}-{scale}")
    convert(Model(name=source.name, kind="local", path=str(source)), artifacts, RequantOptions(), dtype, scale)
    return artifacts.checkpoint


def served(
    jobs: list[tuple[Path, dict]], run: Callable[..., subprocess.CompletedProcess] = subprocess.run
) -> Iterator[list[Generation] | None]:
    """vLLM's generations for each job, a checkpoint with its engine arguments; this module in another process makes them.
    `run` runs it.

    None where vLLM fails: on a GPU it does where token numbers are sampled from NaN.
    """
    jobs_text = json.dumps([(str(checkpoint), engine) for checkpoint, engine in jobs])
    command = [sys.executable, "-m", "benchmarks.dtypes", "--serve", jobs_text]
    # On a CPU an engine within the process starts in 3 s instead of 20. On a GPU only a process of its own, when it ends,
    # gives all memory back.
    settings = {} if torch.cuda.is_available() else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=settings | os.environ)
    if done.returncode:
        sys.exit(f"error: vLLM ended with status {done.returncode}; its message stands above")
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            found = json.loads(line.removeprefix(RESULT))
            for each in found or []:
                each["logprobs"] = [{int(token): value for token, value in step.items()} for step in each["logprobs"]]
            yield None if found is None else [Generation(**each) for each in found]


def serve(jobs: list[tuple[str, dict]]) -> None:
    """The other process of `served`: prints a line for each job."""
    from gptoss_nf4.engine.generate import generate

    for checkpoint, engine in jobs:
        try:
            found = [asdict(each) for each in generate(Path(checkpoint), PROMPTS, 16, engine)]
        except RuntimeError as error:
            print(f"{checkpoint}: {error}", file=sys.stderr)
            found = None
        print(RESULT + json.dumps(found), flush=True)


def agreements(
    source: Path,
    directory: Path,
    engine: dict,
    cases: tuple[Case, ...] = CASES,
    run: Callable[..., subprocess.CompletedProcess] = subprocess.run,
) -> Agreements:
    """Agreement with transformers in float32 by case; None where vLLM fails or is not finite."""
    found: Agreements = {}
    jobs = [(converted(source, directory, case), engine | {"dtype": case[0]}) for case in cases]
    for case, generations in zip(cases, served(jobs, run), strict=True):
        if generations is None or not all(generation.finite for generation in generations):
            found[case] = None
            continue
        found[case], _ = reference.agreements(open_checkpoint(source), generations)
    return found


def rows(model: str, found: Agreements) -> list[list]:
    table = []
    for (dtype, scale), agreement in found.items():
        result = ["not finite", ""]
        if agreement is not None:
            result = [f"{agreement.worst_difference:.4f}", f"{agreement.agreeing}/{agreement.positions}"]
        table.append([model, dtype, scale, *result])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vLLM, as JSON")
    parser.add_argument("--models", nargs="*", default=["tiny", "tiny_massive"], choices=["tiny", "tiny_massive"])
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    table = []
    with tempfile.TemporaryDirectory() as directory:
        sources = write_models(Path(directory))
        for name in args.models:
            table += rows(name, agreements(sources[name], Path(directory), ENGINE | args.engine))
    print(markdown(["model", "dtype", "residual_scale", "worst difference in log-probability", "same first choice"], table))


if __name__ == "__main__":
    main()

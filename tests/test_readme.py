"""What README.md and CONTRIBUTING.md say: their commands, in a clean clone, and the files that they name.

Every command in their code blocks stands in one of three tables below. A new one without a place there fails.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from adapter_makers import ATTENTION, with_adapter
from project_imports import ROOT
from whole_model import whole_model

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
METRICS = ("dtypes", "exactness", "smoke", "benchmark")
PROGRAMS = ("make", "python", "dvc", "vllm", "pip", "source", "pre-commit")


@dataclass(frozen=True)
class Trial:
    """How a command is tried in the clone: a pattern that it has to print, and what is put in place of parts of it.

    `{source}` stands for a copy of the embedded model, `{adapter}` for an adapter on it, both outside of the clone.
    """

    prints: str
    instead: tuple[tuple[str, str], ...] = ()


# Run here, in this order, by the shell, in the clone's own environment.
RUN_HERE = {
    "source .venv/bin/activate": Trial(""),
    "python stages/configure.py model=local model.path=/data/my-finetune engine=gpu": Trial(
        "my-finetune", (("/data/my-finetune", "{source}"), ("engine=gpu", "engine=cpu"))
    ),
    "python stages/configure.py model=gpt_oss_20b 'adapters={mine: /data/my-lora, theirs: someone/their-lora}'": Trial(
        "adapters mine, theirs",
        (
            ("model=gpt_oss_20b", "model=local model.path={source}"),  # needs no download
            ("/data/my-lora", "{adapter}"),
            ("someone/their-lora", "{adapter}"),
        ),
    ),
    "python stages/configure.py model=gpt_oss_20b 'adapters={mine: /data/my-lora}' "
    "requant.mode=nf4 requant.merge=mine": Trial(
        "model my-finetune-mine, .* mine merged",
        (("model=gpt_oss_20b", "model=local model.path={source}"), ("/data/my-lora", "{adapter}")),
    ),
    "python stages/configure.py model=local model.path=/data/my-lora": Trial(
        "model my-finetune, .* adapters my-lora", (("/data/my-lora", "{adapter}"),)
    ),
    "dvc repro": Trial("smoke_adapter: my-lora, .*top1_agreement"),
    "dvc repro requant@7": Trial("up to date", (("@7", "@1"),)),  # the embedded model has two layers
    "dvc repro assemble -f": Trial("Running stage 'requant@1'"),
    "dvc repro -s -f assemble": Trial("Running stage 'assemble'"),
    "python stages/normalize.py dtype=bfloat16": Trial("values to bfloat16"),
    "python stages/parallel.py": Trial("values to float16"),
    "python stages/verify.py": Trial("files as they were proved"),
    "dvc metrics show": Trial(r"exactness\.json"),
    "pre-commit install": Trial("installed"),
    "pre-commit run --all-files": Trial(r"mypy\.+Passed"),
}
# Run by another test: (file in tests/, function).
RUN_ELSEWHERE = {
    "make run": ("test_readme.py", "test_make_run_from_a_clean_clone"),
    "vllm serve artifacts/my-finetune/checkpoint": (
        "test_vllm.py",
        "test_vllm_serve_without_flags_answers_an_openai_client",
    ),
    "vllm serve artifacts/gpt_oss_20b/checkpoint --enable-lora --max-lora-rank 16 --lora-modules mine=/data/my-lora": (
        "test_vllm_lora.py",
        "test_a_server_loads_and_unloads_adapters_and_refuses_what_does_not_fit",
    ),
    "python stages/configure.py model=gpt_oss_20b": ("test_pipeline_files.py", "test_every_model_and_engine_composes"),
    "dvc repro assemble": ("test_pipeline.py", "test_nothing_changed_runs_nothing"),
    "python -m benchmarks.machine_code": ("test_kernels.py", "test_every_launch_fits_the_gpu"),
}
# Run by no test.
NOT_RUN = {
    "make test": "runs this test",
    "make quick": "runs a part of these tests",
    "python -m benchmarks.serving": "needs an NVIDIA GPU; tests/test_serving_benchmark.py has what does not",
    "python -m benchmarks.kernels": "needs an NVIDIA GPU",
}


def code_lines(text: str) -> Iterator[str]:
    """The lines of a document's code blocks, indented or fenced."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands(text: str) -> list[str]:
    """The commands in a document's code blocks, without prompts and comments."""
    bare = (re.sub(r"\s+#.*", "", line.removeprefix("$ ")) for line in code_lines(text))
    return [line for line in bare if line.split(" ")[0] in PROGRAMS]


def test_commands_are_found_in_both_kinds_of_code_block():
    text = "make it so\n\n    make run     # a comment\n    fetch -> dequant\n\n```bash\n$ dvc repro 'a#b'\n```\n"
    assert commands(text) == ["make run", "dvc repro 'a#b'"]


def test_every_command_is_run_by_a_test_or_says_why_not():
    written = {command for name in DOCUMENTS for command in commands((ROOT / name).read_text())}
    known = [*RUN_HERE, *RUN_ELSEWHERE, *NOT_RUN]
    assert sorted(written - set(known)) == [], "in no table"
    assert sorted(set(known) - written) == [], "in no document"
    assert len(known) == len(set(known))


@pytest.mark.parametrize(("file", "function"), RUN_ELSEWHERE.values())
def test_the_tests_that_run_commands_exist(file, function):
    nodes = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
    assert function in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    for name in re.findall(r"`((?:gptoss_nf4|stages|conf|requirements|tests|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


@dataclass(frozen=True)
class Clone:
    """A clone in which `make run` has run, the seconds that it took, and what a user has beside it."""

    directory: Path
    seconds: float
    source: Path
    adapter: Path

    def shell(self, command: str) -> str:
        """What `command` prints, in the clone's environment."""
        return run(["bash", "-c", f"source .venv/bin/activate && {command}"], self.directory)


def run(command: list[str], directory: Path) -> str:
    """What `command` prints, without this test's own virtual environment; fails where it does."""
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    own = str(Path(sys.prefix) / "bin")
    environment["PATH"] = ":".join(path for path in environment["PATH"].split(":") if path != own)
    environment["PRE_COMMIT_HOME"] = str(directory.parent / "pre-commit")
    done = subprocess.run(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def make_run(directory: Path) -> float:
    """Seconds that `make run` takes."""
    started = time.monotonic()
    run(["make", "run", f"PYTHON={Path(sys.base_prefix) / 'bin' / 'python3'}"], directory)
    return time.monotonic() - started


def save_adapter(source: Path, directory: Path) -> None:
    """An adapter on the attention of `source`, as PEFT saves it; it names `source` as its base."""
    model = with_adapter(whole_model(source), target_modules=ATTENTION)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.25)  # small enough for 16 bit to agree with float32
    model.peft_config["default"].base_model_name_or_path = str(source)
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def clone(tiny, tmp_path_factory) -> Clone:
    root = tmp_path_factory.mktemp("readme")
    directory, source, adapter = root / "clone", root / "my-finetune", root / "my-lora"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(directory)], check=True)
    shutil.copytree(tiny, source)
    save_adapter(source, adapter)
    return Clone(directory, make_run(directory), source, adapter)


@pytest.mark.slow
def test_make_run_from_a_clean_clone(clone):
    read = {name: json.loads((clone.directory / f"metrics/{name}.json").read_text()) for name in METRICS}
    assert read["exactness"]["compared"] > 0
    assert read["exactness"]["different"] == 0
    assert read["smoke"]["top1_agreement"] >= 0.8
    assert all(generation["distinct_tokens"] > 8 for generation in read["smoke"]["generations"])
    assert [row["batch"] for row in read["benchmark"]["batches"]] == [1, 4, 8]
    assert all(row["output_tokens_per_second"] > 0 for row in read["benchmark"]["batches"])
    assert "failed" not in clone.shell("dvc plots show 2>&1")
    drawn = (clone.directory / "dvc_plots/index.html").read_text()
    for each in ("output_tokens_per_second", "megabytes", "seconds", "mean absmax", "difference"):
        assert each in drawn
    assert "Proved exact." in (clone.directory / "artifacts/tiny/report.html").read_text()
    assert (clone.directory / "artifacts/tiny/checkpoint/README.md").read_text().startswith("---\n")
    again = make_run(clone.directory)
    print(f"make run from a clean clone: {clone.seconds:.0f} s; again, nothing changed: {again:.1f} s")
    assert again < 20
    assert run(["git", "status", "--porcelain"], clone.directory).split() == ["??", "dvc.lock"]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_runs(command, clone):
    trial, tried = RUN_HERE[command], command
    for part, other in trial.instead:
        assert part in command
        tried = tried.replace(part, other.format(source=clone.source, adapter=clone.adapter))
    assert re.search(trial.prints, clone.shell(tried))

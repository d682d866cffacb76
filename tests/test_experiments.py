"""Experiments and remotes, by the commands that DVC's documentation shows, in one repository for all tests."""

import json
import subprocess
from pathlib import Path

import pytest
from test_pipeline import repro, run

from benchmarks.conversion import checkout as copy_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository in which the embedded model is converted, all committed, with a directory as remote."""
    root = tmp_path_factory.mktemp("experiments")
    project = copy_project(root / "project")
    repro(project, "assemble")
    run(project, "dvc", "remote", "add", "--default", "shared", str(root / "remote"))
    commit(project)
    return project


def commit(project: Path) -> None:
    subprocess.run(["git", "add", "-A"], cwd=project, check=True)
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    subprocess.run(["git", *who, "commit", "-qm", "a state"], cwd=project, check=True)


def experiments(project: Path) -> dict[str, dict]:
    """What `dvc exp show` knows of each experiment of this commit, by its name."""
    _, baseline = json.loads(run(project, "dvc", "exp", "show", "--json"))
    states = [state for experiment in baseline["experiments"] or [] for state in experiment["revs"]]
    return {state["name"]: state["data"] for state in states}


def of(data: dict, kind: str, file: str) -> dict:
    return dict(data[kind][file]["data"])


def test_an_experiment_changes_what_is_named_and_can_be_compared(project):
    said = run(project, "dvc", "exp", "run", "-n", "brain", "-S", "dtype=bfloat16", "assemble")
    assert "Running stage 'normalize'" in said
    assert "Running stage 'requant" not in said
    found = experiments(project)["brain"]
    assert of(found, "params", "params.yaml")["dtype"] == "bfloat16"
    assert of(found, "metrics", "metrics/dtypes.json")["dtype"] == "bfloat16"
    params = json.loads(run(project, "dvc", "params", "diff", "--json"))
    assert params == {"params.yaml": {"dtype": {"old": "float16", "new": "bfloat16"}}}
    metrics = json.loads(run(project, "dvc", "metrics", "diff", "--json"))["metrics/dtypes.json"]
    assert metrics["scaling.residual_scale"] == {"old": 2**-6, "new": 1.0, "diff": 1 - 2**-6}
    table = run(project, "dvc", "exp", "show", "--csv")
    assert "metrics/dtypes.json:dtype" in table.splitlines()[0]
    assert "by_tensor" not in table.splitlines()[0], "a column for each tensor"
    run(project, "git", "checkout", "-q", "--", "params.yaml", "dvc.lock")
    run(project, "dvc", "checkout", "-q", "--force", "--allow-missing")


def test_a_queue_runs_a_model_in_several_dtypes(project):
    """Each in a directory of its own. The second finds its layers in the cache, and there the sample is not."""
    run(project, "dvc", "exp", "run", "--queue", "-S", "model=tiny_massive", "-S", "dtype=bfloat16,float16", "assemble")
    run(project, "dvc", "exp", "run", "--run-all", "-j", "1")
    found = [of(data, "metrics", "metrics/dtypes.json") for data in experiments(project).values()]
    queued = [metrics["dtype"] for metrics in found if metrics["model"] == "tiny_massive"]
    assert sorted(queued) == ["bfloat16", "float16"]
    assert "model: tiny_massive" not in (project / "params.yaml").read_text()


def test_layers_are_shared_between_machines(project, tmp_path):
    """`dvc push` here, `dvc pull` there: nothing is converted again, and another dtype runs no layer."""
    run(project, "dvc", "push", "-q")
    other = tmp_path / "other"
    subprocess.run(["git", "clone", "-q", str(project), str(other)], check=True)
    run(other, "dvc", "pull", "-q", "--allow-missing")
    weights = "artifacts/tiny/checkpoint/layer-1.safetensors"
    assert (other / weights).read_bytes() == (project / weights).read_bytes()
    assert repro(other, "assemble") == set()
    run(other, "python", "stages/configure.py", "dtype=float32")
    assert repro(other, "assemble") == {"normalize", "assemble"}

"""The README's two commands and its claims, on a clean clone."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from project_imports import ROOT

METRICS = ("dtypes", "exactness", "smoke", "benchmark")


def make_run(clone: Path) -> float:
    """Run `make run` as a newcomer would, without this test's own virtual environment; returns seconds."""
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = ":".join(p for p in environment["PATH"].split(":") if not p.startswith(str(ROOT)))
    started = time.monotonic()
    python = Path(os.sys.base_prefix) / "bin" / "python3"
    done = subprocess.run(
        ["make", "run", f"PYTHON={python}"],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return time.monotonic() - started


@pytest.mark.slow
def test_make_run_from_a_clean_clone(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    first = make_run(clone)
    metrics = {name: json.loads((clone / f"metrics/{name}.json").read_text()) for name in METRICS}
    assert metrics["exactness"]["compared"] > 0
    assert metrics["exactness"]["different"] == 0
    assert metrics["smoke"]["top1_agreement"] >= 0.8
    assert all(generation["distinct_tokens"] > 8 for generation in metrics["smoke"]["generations"])
    assert [row["batch"] for row in metrics["benchmark"]["batches"]] == [1, 4, 8]
    assert all(row["output_tokens_per_second"] > 0 for row in metrics["benchmark"]["batches"])
    plots = subprocess.run(
        [clone / ".venv/bin/dvc", "plots", "show", "-o", "plots"], cwd=clone, capture_output=True, text=True
    )
    assert plots.returncode == 0, plots.stderr
    assert "output_tokens_per_second" in (clone / "plots/index.html").read_text()
    second = make_run(clone)
    print(f"make run from a clean clone: {first:.0f} s; again, nothing changed: {second:.1f} s")
    assert second < 20
    changed = subprocess.check_output(["git", "status", "--porcelain"], cwd=clone, text=True)
    assert changed.split() in (["??", "dvc.lock"], ["??", "dvc.lock", "??", "plots/"])


def test_the_readme_names_only_files_that_exist():
    import re

    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:gptoss_nf4|stages|conf|requirements)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name

"""Real dimensions through the pipeline: memory does not grow with layers, so two of them will do."""

import json
from argparse import Namespace

import pytest

from benchmarks import conversion

pytestmark = pytest.mark.slow
MEMORY_BOUND = 2 << 30


def test_real_dimensions_stay_within_their_memory(tmp_path):
    """Every core used, no process above 2 GiB, a plain `dvc repro` finds nothing to do, every weight is equal."""
    model, layers = "synthetic_20b", 2
    args = Namespace(model=model, layers=layers)
    project = conversion.checkout(tmp_path / "project")
    conversion.configure(project, args, layers)
    conversion.run(project, *conversion.DVC, "repro", "-s", "fetch")
    conversion.clean(project)
    made = conversion.run(project, conversion.PYTHON, "stages/parallel.py")
    assert made.stages == 3 + 2 * layers  # fetch, normalize, assemble; dequant and requant of each layer
    assert made.peak_bytes < MEMORY_BOUND
    assert conversion.run(project, *conversion.DVC, "repro", "assemble").stages == 0
    proof = conversion.run(project, *conversion.DVC, "repro", "prove")
    assert proof.stages == 1
    assert proof.peak_bytes < MEMORY_BOUND
    exactness = json.loads((project / "metrics/exactness.json").read_text())
    d = json.loads((project / "artifacts" / model / "manifest.json").read_text())["dimensions"]
    weights = d["hidden"] * (2 * d["heads"] * d["head_dim"] + 2 * d["kv_heads"] * d["head_dim"])
    weights += 3 * d["hidden"] * d["intermediate"] * d["experts"]
    four_bit = ("attention_weight", "w13_weight", "w2_weight")
    compared = sum(each["compared"] for each in exactness["by_kind"] if each["kind"] in four_bit)
    assert (compared, exactness["different"]) == (layers * weights, 0)

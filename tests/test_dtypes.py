"""Bringing dense tensors to one dtype, and the audit."""

from argparse import Namespace

import pytest
import torch
from conftest import edit_shard, local
from halves import thinned

from gptoss_nf4.check.audit import audit
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.flow import convert
from gptoss_nf4.format.cast import cast
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint


def test_losses_are_counted():
    values = torch.tensor([1.0, 70000.0, -70000.0, 1e-12, 0.0, float("nan"), float("inf"), 65504.0])
    result, counts = cast(values.reshape(2, 4), torch.float16)
    assert (counts.values, counts.overflow, counts.underflow, counts.non_finite) == (8, 2, 1, 2)
    assert result.shape == (2, 4)
    assert result[0, 0] == 1


@pytest.mark.parametrize("small", thinned([1000, 56], 2))
def test_pieces_make_the_same_file_and_the_same_counts(tiny, tmp_path, monkeypatch, small):
    made = []
    for piece_bytes in (1 << 23, small):
        monkeypatch.setattr("gptoss_nf4.storage.checkpoint.PIECE_BYTES", piece_bytes)
        model, artifacts = local(tiny, tmp_path / str(piece_bytes))
        fetch(model, artifacts)
        report = normalize(open_source(model, artifacts), artifacts, RequantOptions(), "float16")
        made.append((report, artifacts.dense_weights.read_bytes()))
    assert made[0] == made[1]


def test_room_is_asked_for_in_the_results_dtype(tiny, tmp_path, monkeypatch):
    """Between fetch, which counted bfloat16, and normalize the disk is left with room for half of float32."""
    model, artifacts = local(tiny, tmp_path / "artifacts")
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    normalize(source, artifacts, RequantOptions(), "float32")
    free = artifacts.dense_weights.stat().st_size * 3 // 4
    artifacts.dense_weights.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: Namespace(free=free))
    with pytest.raises(UserError, match=r"disk too small.*dense\.safetensors in float32"):
        normalize(source, artifacts, RequantOptions(), "float32")
    assert not artifacts.dense_weights.exists()
    normalize(source, artifacts, RequantOptions(), "bfloat16")


@pytest.mark.parametrize("name", ["mlp.router.linear.weight", "mlp.experts.down_projs.5.bias", "self_attn.v_proj.bias"])
@pytest.mark.parametrize(("value", "kind"), [(1e5, "overflow"), (float("nan"), "not finite")])
def test_overflow_and_nan_fail_naming_the_tensor(source_copy, tmp_path, name, value, kind):
    name = f"model.layers.1.{name}"

    def change(tensors):
        tensors[name].view(-1)[5] = value

    edit_shard(source_copy, 1, change)
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    with pytest.raises(UserError, match=kind) as caught:
        convert(model, artifacts, RequantOptions(), "float16")
    assert name in str(caught.value)
    assert not artifacts.dense_weights.exists()
    assert not list(tmp_path.rglob("*.part"))


def test_the_router_of_another_dtype_is_brought_along_and_the_audit_would_see_it(tiny, tmp_path):
    """The seed died of one router in another dtype."""
    stored = Checkpoint(tiny).tensors
    assert stored["model.layers.0.mlp.router.linear.weight"].dtype == "F32"
    assert stored["model.layers.0.input_layernorm.weight"].dtype == "BF16"
    model, artifacts = local(tiny, tmp_path / "artifacts")
    convert(model, artifacts, RequantOptions(), "float16")
    result = Checkpoint(artifacts.checkpoint)
    assert result.tensors["model.layers.0.mlp.router.weight"].dtype == "F16"
    assert audit(result, "float16").keys() == {"F16"}
    with pytest.raises(UserError, match="mixed dtypes"):
        audit(result, "bfloat16")

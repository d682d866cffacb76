"""The synthetic source: the published layout, the same bytes every time, and the tensors that the real one has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.weights import configured
from gptoss_nf4.check.weights import stored_weight
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.fetch.budget import synthetic_bytes
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.flow import convert
from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.samples import synthetic
from gptoss_nf4.samples.embedded import TINY
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.model import Model
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.writing import sha256_of


def digests(directory: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in sorted(directory.iterdir())}


@pytest.mark.parametrize("stacked", [False, True])
def test_writing_twice_gives_the_same_bytes(tmp_path, stacked):
    for name in ("one", "two"):
        synthetic.write_checkpoint(tmp_path / name, TINY, stacked=stacked)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_it_is_valid_and_bitsandbytes_reads_what_we_read(tmp_path):
    synthetic.write_checkpoint(tmp_path, TINY)
    source = open_checkpoint(tmp_path)
    source.validate()
    for module in source.modules(0, names.FUSIONS[0]):
        theirs = stored_weight(source.checkpoint, module.weight)
        assert torch.equal(torch.from_numpy(source.dequantized(module)), theirs)
        assert (source.absmax(module) > 0).all()
        assert theirs.std() > 0
    for name, mean in (("input_layernorm.weight", 1), ("post_attention_layernorm.weight", 1), ("self_attn.sinks", 0)):
        assert source.floating(f"model.layers.1.{name}").tensor().float().mean() == pytest.approx(mean, abs=0.1)
    for name, mean in (("model.norm.weight", 1), ("model.embed_tokens.weight", 0), ("lm_head.weight", 0)):
        assert source.floating(name).tensor().float().mean() == pytest.approx(mean, abs=0.1)


def test_its_index_has_each_tensor_once_in_numbered_shards(tmp_path):
    """As huggingface_hub's split_torch_state_dict_into_shards names them; read by the safetensors library."""
    synthetic.write_checkpoint(tmp_path, TINY)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    stored = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert sorted(stored) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    sizes = [tensor.nbytes for tensors in stored.values() for tensor in tensors.values()]
    assert (index["metadata"]["total_size"], len(index["weight_map"])) == (sum(sizes), len(sizes))


@pytest.mark.parametrize("kind", ["synthetic", "synthetic_fused"])
def test_a_conversion_of_it_is_exact(tmp_path, kind):
    model = Model(name="synthetic", kind=kind, dimensions=TINY)
    report = convert(model, Artifacts(tmp_path), RequantOptions(), "bfloat16")
    assert report["different"] == 0
    assert report["compared"] > 0


def test_a_whole_source_is_left_alone_and_another_size_is_written_anew(tmp_path):
    artifacts = Artifacts(tmp_path)
    assert fetch(Model(name="s", kind="synthetic", dimensions=TINY), artifacts)["source"]["kind"] == "synthetic"
    before = {file: file.stat().st_mtime_ns for file in artifacts.source.iterdir()}
    fetch(Model(name="s", kind="synthetic", dimensions=TINY), artifacts)
    assert {file: file.stat().st_mtime_ns for file in artifacts.source.iterdir()} == before
    one_layer = Dimensions(**(TINY.as_dict() | {"layers": 1}))
    assert fetch(Model(name="s", kind="synthetic", dimensions=one_layer), artifacts)["dimensions"]["layers"] == 1


@pytest.mark.parametrize(("size", "tensors", "gigabytes"), [("20b", 11547, 12.52), ("120b", 65703, 62.08)])
def test_it_has_as_many_tensors_and_bytes_as_the_published_one(size, tensors, gigabytes):
    """By count, from one expert: what the facts about the published checkpoints say."""
    d = configured(f"synthetic_{size}")
    one = Dimensions(**(d.as_dict() | {"experts": 1, "vocabulary": 8}))
    nested_map = np.zeros(256, np.float32)
    layer = {made.declared.name: made.declared.bytes for made in synthetic.layer_tensors(one, 0, nested_map)}
    expert = {name: size for name, size in layer.items() if ".experts." in name}
    rest = {name: size for name, size in layer.items() if name not in expert and "router" not in name}
    router = 2 * (d.hidden + 1) * d.experts
    total = d.layers * (len(expert) * d.experts + len(rest) + 2) + len(names.outside_shapes(d))
    assert total == tensors
    size_of = sum(expert.values()) * d.experts + sum(rest.values())
    outside = 2 * (2 * d.vocabulary * d.hidden + d.hidden)
    whole = d.layers * (size_of + router) + outside
    assert whole / 1e9 == pytest.approx(gigabytes, abs=0.02)
    assert whole < synthetic_bytes(d) < 1.04 * whole  # what the plan asks of the disk

"""Stage adapter's own part: bringing an adapter, refusing one of another base, and describing what it changes."""

import hashlib
import json
import shutil
from pathlib import Path

import layout_makers as makers
import pytest
import torch
from adapter_makers import ATTENTION, EXPERTS, ROUTER, weights_of, with_adapter
from conftest import local
from safetensors.torch import load_file
from whole_model import whole_model

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.adapter import fetch_adapter
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.source.model import AdapterSource, Model, adapter_directory, open_source
from gptoss_nf4.storage.artifacts import Artifacts


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter of PEFT's on everything, and the weights of the base without and with it."""
    directory = tmp_path_factory.mktemp("adapter") / "mine"
    before = weights_of(whole_model(tiny))
    model = with_adapter(whole_model(tiny), target_modules=ATTENTION, target_parameters=EXPERTS + ROUTER)
    model.peft_config["default"].base_model_name_or_path = str(tiny)
    model.save_pretrained(directory)
    return directory, before, weights_of(model.merge_and_unload())


def brought(tiny: Path, root: Path, adapter: AdapterSource, name: str = "test") -> tuple[dict, Artifacts]:
    """`adapter` on the embedded model, which goes by `name` here."""
    model, artifacts = Model(name=name, kind="local", path=str(tiny)), Artifacts(root)
    fetch(model, artifacts)
    return fetch_adapter(adapter, model, open_source(model, artifacts), artifacts), artifacts


def test_what_an_adapter_changes_is_peft_s_to_three_digits(tiny, saved, tmp_path):
    """Of experts the first one's norm stands for all, in a layer each."""
    directory, before, after = saved
    source = AdapterSource("mine", str(directory))
    described, artifacts = brought(tiny, tmp_path, source)
    assert described["modules"].keys() == before.keys()
    for name, about in described["modules"].items():
        delta = (after[name].double() - before[name].double()).norm()
        weight = before[name].double()
        base = weight[0].norm() * len(weight) ** 0.5 if weight.ndim == 3 else weight.norm()
        assert about["relative_size"] == pytest.approx(float(delta / base), rel=6e-3), name
        assert about["relative_size"] == float(f"{about['relative_size']:.3g}")
    assert (described["name"], described["source"]) == ("mine", {"kind": "local", "path": str(directory)})
    assert described["base"] == {"verdict": "exact", "statement": f"The adapter was trained on this base, {tiny}."}
    assert json.loads(artifacts.adapter("mine").read_text()) == described
    expected = [
        {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in ("adapter_config.json", "adapter_model.safetensors")
        for data in [(directory / name).read_bytes()]
    ]
    assert [{key: each[key] for key in expected[0]} for each in described["files"]] == expected
    assert adapter_directory(source, artifacts) == directory


def test_sizes_are_those_of_weights_in_16_bit_too(tmp_path):
    base = tmp_path / "base"
    makers.fused_fp4_and_attention_in_16_bit(base)
    stored = load_file(base / "model.safetensors")
    model = with_adapter(makers.model(), target_modules=ATTENTION)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "mine")
    described, _ = brought(base, tmp_path / "artifacts", AdapterSource("mine", str(tmp_path / "mine")))
    modules = dict(model.base_model.model.named_modules())
    linears = {name: module for name, module in modules.items() if hasattr(module, "get_delta_weight")}
    assert described["modules"].keys() == linears.keys()
    for name, module in linears.items():
        expected = module.get_delta_weight("default").double().norm() / stored[f"{name}.weight"].double().norm()
        assert described["modules"][name]["relative_size"] == pytest.approx(float(expected), rel=6e-3), name


def test_an_adapter_of_a_base_of_zeros_has_no_size(tiny, saved, tmp_path):
    directory, _, _ = saved
    model, artifacts = local(tiny, tmp_path)
    fetch(model, artifacts)
    base = open_source(model, artifacts)
    weight = "model.layers.0.mlp.router"

    class Zero:
        checkpoint, dimensions, module, dequantized = base.checkpoint, base.dimensions, base.module, base.dequantized

        def floating(self, name):
            found = base.floating(name)
            return type("Zeros", (), {"tensor": lambda _: found.tensor() * (name != f"{weight}.weight")})()

    described = fetch_adapter(AdapterSource("mine", str(directory)), model, Zero(), artifacts)
    assert described["modules"][weight]["relative_size"] is None
    assert all(about["relative_size"] for name, about in described["modules"].items() if name != weight)


@pytest.mark.parametrize(
    ("base", "verdict"),
    [("unsloth/gpt-oss-120b-bnb-4bit", "other model"), ("openai/gpt-oss-20b-bf16", "other weights")],
)
def test_an_adapter_of_another_base_is_refused_unless_it_is_asked_for(tiny, saved, tmp_path, base, verdict):
    other = Path(shutil.copytree(saved[0], tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    named = {"base_model_name_or_path": base}
    (other / "adapter_config.json").write_text(json.dumps(config | named))
    with pytest.raises(UserError, match=rf"adapter of another base.*{base}.*any_base: true to adapters\.mine"):
        brought(tiny, tmp_path / "artifacts", AdapterSource("mine", str(other)), "gpt-oss-20b")
    assert not Artifacts(tmp_path / "artifacts").adapter("mine").exists()
    accepted = AdapterSource("mine", str(other), any_base=True)
    described, _ = brought(tiny, tmp_path / "artifacts", accepted, "gpt-oss-20b")
    assert described["base"]["verdict"] == verdict

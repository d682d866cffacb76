"""The pipeline with adapters, through `dvc repro` itself: what save_pretrained wrote, and what a change runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from adapter_makers import ATTENTION, EXPERTS, with_adapter
from conftest import edit_shard
from test_pipeline import repro, run
from whole_model import whole_model

from benchmarks.conversion import checkout as copy_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny) -> Path:
    """A base, two adapters on it, as PEFT saves them, and a project."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny, root / "base")
    targets = {"mine": {"target_modules": ATTENTION, "target_parameters": EXPERTS}, "other": {"target_modules": ["q_proj"]}}
    for name, lora in targets.items():
        with_adapter(whole_model(tiny), **lora).save_pretrained(root / name)
    for name in targets:
        config = json.loads((root / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(root / "base")
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    copy_project(root / "checkout")
    return root


def configure(root: Path, *arguments: str) -> str:
    return run(root / "checkout", "python", "stages/configure.py", *arguments)


def test_one_command_takes_what_save_pretrained_wrote(root):
    """And the base is compared with transformers, the adapter with PEFT, in float32."""
    said = configure(root, "model=local", f"model.path={root / 'mine'}", "dtype=float32")
    assert "is an adapter, called mine here" in said
    ran = repro(root / "checkout", "smoke-adapter")
    assert {"fetch", "requant@0", "assemble", "adapter@mine", "smoke-adapter@mine"} <= ran
    found = json.loads((root / "checkout/metrics/adapters/mine.json").read_text())
    for side in ("base", "adapter"):
        assert found[side]["positions"] > 100
        assert found[side]["worst_logprob_difference"] < 1e-3
    assert all(each["text"] != each["base"] for each in found["generations"])
    described = json.loads((root / "checkout/artifacts/base/adapters/mine.json").read_text())
    assert described["base"]["verdict"] == "exact"
    assert len(described["modules"]) == 2 * (len(ATTENTION) + 2)
    assert all(about["relative_size"] > 0 for about in described["modules"].values())


def test_a_changed_adapter_runs_its_own_stages_and_a_changed_layer_runs_no_adapter(root):
    adapters = f"adapters={{mine: {root / 'mine'}, other: {root / 'other'}}}"
    configure(root, "model=local", f"model.path={root / 'base'}", adapters, "dtype=float32")
    checkout = root / "checkout"
    assert repro(checkout, "assemble", "adapter") == {"adapter@other"}
    config = root / "other" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert repro(checkout, "assemble", "adapter") == {"adapter@other"}

    def change_codes(tensors: dict) -> None:
        tensors["model.layers.1.mlp.experts.down_projs.2.weight"][7] ^= 0x11

    edit_shard(root / "base", 1, change_codes)
    ran = repro(checkout, "assemble", "adapter")
    assert "requant@1" in ran
    assert not any(stage.startswith("adapter") for stage in ran)


def test_an_adapter_of_another_model_is_refused_by_name(root):
    other = shutil.copytree(root / "mine", root / "of-120b")
    config = json.loads((other / "adapter_config.json").read_text())
    for base, refused in (("unsloth/gpt-oss-120b-unsloth-bnb-4bit", True), (None, False)):
        (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        named = f"adapters={{other: {other}}}"
        configure(root, "model=local", f"model.path={root / 'base'}", "model.name=gpt-oss-20b", named, "dtype=float32")
        if refused:
            with pytest.raises(AssertionError, match=r"adapter of another base.*any_base: true"):
                repro(root / "checkout", "adapter@other")
            assert not (root / "checkout/artifacts/gpt-oss-20b/adapters/other.json").exists()
        else:
            assert "adapter@other" in repro(root / "checkout", "adapter@other")
    assert re.search("base", (root / "checkout/artifacts/gpt-oss-20b/adapters/other.json").read_text())

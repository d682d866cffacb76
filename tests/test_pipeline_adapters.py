"""The pipeline with adapters, through `dvc repro` itself: what save_pretrained wrote, and what a change runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from adapter_makers import ATTENTION, EXPERTS, ROUTER, with_adapter
from conftest import edit_shard
from test_pipeline import repro, run
from whole_model import whole_model

from benchmarks.conversion import checkout as copy_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny) -> Path:
    """A base, three adapters on it, as PEFT saves them, and a project."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny, root / "base")
    targets = {
        "mine": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
        "other": {"target_modules": ["q_proj"]},
        "routing": {"target_parameters": ROUTER},
    }
    for name, lora in targets.items():
        with_adapter(whole_model(tiny), **lora).save_pretrained(root / name)
    for name in targets:
        config = json.loads((root / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(root / "base")
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    copy_project(root / "checkout")
    return root


def configure(root: Path, *arguments: str) -> str:
    """Eight tokens for each prompt: vLLM's steps are what takes long, and a prompt has twenty positions already."""
    return run(root / "checkout", "python", "stages/configure.py", "smoke.max_tokens=8", *arguments)


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


def merging(root: Path, name: str) -> None:
    adapters = f"adapters={{{name}: {root / name}, other: {root / 'other'}}}"
    nf4 = ["requant.mode=nf4", f"requant.merge={name}"]
    said = configure(root, "model=local", f"model.path={root / 'base'}", adapters, *nf4, "dtype=float32")
    assert f"model base-{name}" in said
    assert f"{name} merged" in said


def test_a_merge_quantizes_again_and_says_what_is_lost(root):
    """With the adapter merged; a change of it runs all that reads it. The other adapter is checked, but not served."""
    merging(root, "mine")
    checkout = root / "checkout"
    ran = repro(checkout, "smoke", "smoke-adapter")
    merge = {"requant@0", "requant@1", "normalize", "prove", "smoke"}
    assert {"adapter@mine", "assemble", "smoke-adapter@mine", "smoke-adapter@other"} | merge <= ran
    proved = json.loads((checkout / "metrics/exactness.json").read_text())
    assert (proved["model"], proved["different"], proved["merge"]["adapter"]) == ("base-mine", 0, "mine")
    assert {each["kind"] for each in proved["merge"]["kinds"]} == {*ATTENTION, "w13", "w2"}
    assert 0.05 < proved["merge"]["total"]["relative_rms_error"] < 0.15
    smoke = json.loads((checkout / "metrics/smoke.json").read_text())
    assert smoke["positions"] == smoke["without_adapter"]["positions"] > 100
    assert smoke["worst_logprob_difference"] > 1e-3  # an error that the exact checkpoint would have to explain
    for name in ("mine", "other"):
        assert "mine is merged here" in json.loads((checkout / f"metrics/adapters/{name}.json").read_text())["left_out"]
    assert repro(checkout, "smoke", "smoke-adapter") == set()
    config = root / "mine" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert (merge | {"adapter@mine"}) - {"smoke"} <= repro(checkout, "prove")
    config.write_text(config.read_text() + "\n")  # or DVC's cache would have all that parallel.py asks for
    shutil.rmtree(checkout / "artifacts/base-mine")
    assert "adapter: mine," in run(checkout, "python", "stages/parallel.py")
    assert repro(checkout, "assemble") == set()


def test_a_merge_that_quantizes_nothing_agrees_with_the_unmerged_pair(root):
    """The router is dense, so in float32 the merged checkpoint is the base with the adapter, and not the base alone."""
    merging(root, "routing")
    repro(root / "checkout", "smoke")
    smoke = json.loads((root / "checkout/metrics/smoke.json").read_text())
    assert smoke["merged_adapter"] == "routing"
    assert smoke["worst_logprob_difference"] < 1e-3
    assert smoke["without_adapter"]["worst_logprob_difference"] > 0.1

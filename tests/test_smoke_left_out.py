"""What smoke leaves out on a machine that is too small or too slow, and that it says so."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import warm_python
from adapter_makers import ATTENTION, with_adapter
from project_imports import ROOT
from whole_model import whole_model

from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.check import reference
from gptoss_nf4.check.agreement import Generation
from gptoss_nf4.check.reference import ATTENTION_COPIES, peak_bytes
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.engine.forecast import forecast_on_cpu
from gptoss_nf4.fetch.adapter import fetch_adapter
from gptoss_nf4.flow import convert
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.model import AdapterSource, Model, open_source
from gptoss_nf4.storage import machine
from gptoss_nf4.storage.artifacts import Artifacts

GIB = 1 << 30


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The embedded model converted, with an adapter, as stages find it below the working directory."""
    root = tmp_path_factory.mktemp("project")
    model, artifacts = Model(name="tiny", kind="embedded"), Artifacts(root / "artifacts/tiny")
    convert(model, artifacts, RequantOptions(), "float16")
    with_adapter(whole_model(artifacts.source), target_modules=ATTENTION).save_pretrained(root / "mine")
    fetch_adapter(AdapterSource("mine", str(root / "mine")), model, open_source(model, artifacts), artifacts)
    run(root, "configure.py", f"adapters={{mine: {root / 'mine'}}}")
    return root


def run(project: Path, script: str, *overrides: str) -> str:
    command = ["python", ROOT / "stages" / script, *overrides]
    environment = warm_python.environment()
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_smoke_says_that_it_left_vllm_out(project):
    said = run(project, "smoke.py", "engine.max_minutes=0")
    assert "smoke: left out: vLLM, which needs about" in said
    assert "minutes here; engine.max_minutes is 0" in said
    written = json.loads((project / "metrics/smoke.json").read_text())
    assert written["left_out"] in said
    assert written["generations"] == []
    assert "top1_agreement" not in written


@pytest.mark.slow
def test_an_environment_without_a_value_and_a_cache_of_no_number(project):
    """null sets nothing. A cache that is no number is one line."""
    run(project, "smoke.py", "engine.max_minutes=0", "engine.env.VLLM_CPU_KVCACHE_SPACE=null", "+engine.env.FOO=null")
    with pytest.raises(AssertionError, match=r"error: bad setting: engine.env.VLLM_CPU_KVCACHE_SPACE: got 'much'"):
        run(project, "smoke.py", "engine.env.VLLM_CPU_KVCACHE_SPACE=much")


@pytest.mark.slow
def test_smoke_adapter_says_so_too(project):
    said = run(project, "smoke_adapter.py", "adapter=mine", "engine.max_minutes=0")
    assert "smoke_adapter: mine, left out: vLLM" in said
    written = json.loads((project / "metrics/adapters/mine.json").read_text())
    assert written["adapter"]["left_out"] == written["base"]["left_out"]
    assert written["generations"] == []


def test_the_peak_is_a_layer_of_gpt_oss_20b_or_the_head():
    """By hand: 26.5 M weights of attention, 530.8 M and 265.4 M of the experts; 579.1 M of the head."""
    attention, w13, w2 = 2880 * (2 * 4096 + 2 * 512), 32 * 5760 * 2880, 32 * 2880 * 2880
    assert peak_bytes(GPT_OSS_20B, 0) == 4 * (attention + w13 + w2) == 3291217920
    assert peak_bytes(GPT_OSS_20B, 0, with_adapter=True) == 4 * (attention + 3 * w13 + w2)
    assert peak_bytes(GPT_OSS_20B, 1000) == peak_bytes(GPT_OSS_20B, 0) + 4 * ATTENTION_COPIES * 64 * 1000**2
    assert peak_bytes(replace(GPT_OSS_20B, experts=1), 0) == 4 * 201088 * 2880


def test_a_comparison_without_the_memory_for_it_is_left_out(tiny, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "stages"))
    import smoke

    source, generations = open_checkpoint(tiny), [Generation("", "", [1, 2, 3], 3, [{}, {2: -1.0}, {3: -1.0}])]
    needed = reference.peak_bytes(source.dimensions, 3)
    monkeypatch.setattr(smoke, "available_memory", lambda: needed - 1)
    result, _ = smoke.compare(source, generations)
    assert "the comparison, whose reference needs about" in result["left_out"]
    monkeypatch.setattr(smoke, "available_memory", lambda: needed)
    result, _ = smoke.compare(source, generations)
    assert result["positions"] == 2


def test_the_forecast_of_a_20b():
    """On two cores vLLM took 80 s for these 122 tokens and 24 more of each, from a checkpoint of 12.6 GiB."""
    prompts = ["x" * 24, "x" * 17, "x" * 74, "x" * 7]
    forecast = forecast_on_cpu(GPT_OSS_20B, int(12.6 * GIB), GIB, prompts, 24, cores=2)
    assert 80 < forecast.seconds < 240
    assert forecast.too_much(24 * GIB, 20) is None
    assert "GiB of memory; 8.0 are free" in (forecast.too_much(8 * GIB, 20) or "")
    assert "minutes here" in (forecast.too_much(24 * GIB, 1) or "")
    longer = forecast_on_cpu(GPT_OSS_20B, int(12.6 * GIB), GIB, prompts, 2400, cores=2)
    assert "minutes here" in (longer.too_much(24 * GIB, 20) or "")


@pytest.mark.parametrize(("limit", "free"), [("max", None), ("3000", 3000 - 2500 + 1200)])
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, limit, free):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 1300\ninactive_file 1000\nactive_file 200\n")
    without = machine.available_memory()
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_memory() == free if free else machine.available_memory() > without / 2

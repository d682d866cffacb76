"""residual_scale: float16 where the residual stream passes float16's largest number."""

import re
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch
import warm_vllm
from conftest import edit_shard, local
from project_imports import ROOT
from whole_model import whole_model

from benchmarks.dtypes import ENGINE, agreements, rows
from gptoss_nf4.check.agreement import Generation
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.flow import convert
from gptoss_nf4.format.residual import AUTO_FLOAT16, ScalingLoss, report, resolve, scaling_loss, writes_to_stream
from gptoss_nf4.samples import embedded
from gptoss_nf4.samples.embedded import MASSIVE_CHANNEL
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.reading import read_json_object


@pytest.mark.parametrize(
    ("setting", "dtype", "scale"),
    [
        ("auto", "float16", AUTO_FLOAT16),
        ("auto", "bfloat16", 1),
        ("auto", "float32", 1),
        (0.25, "bfloat16", 0.25),
        (1, "float16", 1),
    ],
)
def test_what_the_setting_stands_for(setting, dtype, scale):
    assert resolve(setting, dtype) == scale


@pytest.mark.parametrize("setting", [0, -0.5, 0.3, 2, 1e-9, "", "x", None, True, float("nan"), [0.5]])
def test_only_powers_of_two_are_taken(setting):
    with pytest.raises(UserError, match="power of two"):
        resolve(setting, "float16")


def test_the_massive_model_leaves_float16_in_one_channel_that_its_norms_take_out(massive):
    """As trained models have it: beyond 65504 in the stream, and ordinary numbers behind every norm."""
    model, ids = whole_model(massive), torch.arange(40)[None]
    seen = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    model.model.norm.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    with torch.no_grad():
        model(ids)
    others = torch.arange(model.config.hidden_size) != MASSIVE_CHANNEL
    behind_a_layer = seen[2:]
    assert len(behind_a_layer) == 2 * model.config.num_hidden_layers - 1
    for given, made in behind_a_layer:
        assert given[..., MASSIVE_CHANNEL].min() > 30000
        assert (made[..., MASSIVE_CHANNEL] == 0).all()
        assert 0.25 < made[..., others].square().mean().sqrt() < 4
    assert seen[-1][0][..., MASSIVE_CHANNEL].min() > 65504


def test_exactly_what_writes_to_the_stream_is_scaled(massive, tmp_path):
    model, artifacts = local(massive, tmp_path)
    convert(model, artifacts, RequantOptions(), "float16")
    tensors = Checkpoint(artifacts.checkpoint).tensors
    scaled = {
        name.removeprefix("model.layers.2.")
        for name, t in tensors.items()
        if writes_to_stream(name, t.floating) and (name.startswith("model.layers.2.") or "layers" not in name)
    }
    assert scaled == {
        "model.embed_tokens.weight",
        "self_attn.o_proj.bias",
        "self_attn.o_proj.weight.absmax",
        "mlp.experts.w2.bias",
        "mlp.experts.w2.weight.absmax",
    }


def test_losses_by_scaling_are_counted_value_by_value():
    smallest = 2.0**-14
    values = torch.tensor([1.0, smallest * 64, smallest * 63, smallest, 2.0**-24 * 32, 2.0**-24 * 31, 0.0]).half()
    loss = scaling_loss(values, 2.0**-6)
    # 63/64 and 1/64 of the smallest normal number are subnormal; half of the smallest subnormal rounds to even, to zero.
    assert (loss.values, loss.became_subnormal, loss.became_zero) == (7, 2, 2)
    exact = values.double() * 2.0**-6
    error = ((values * 2.0**-6).double() - exact).square().sum() / exact.square().sum()
    assert loss.relative_error == pytest.approx(float(error.sqrt()), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [2.0**-6, 2.0**-14, 0.5])
def test_losses_of_every_value_and_of_many_equal_ones(dtype, scale):
    """Against float64, value by value: all 65,536 patterns of 16 bits that are finite, some of them often, in any shape."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    if dtype == torch.float32:
        every = torch.cat([every.float(), every.float() * 2.0**-120, torch.tensor([2.0**-149, -(2.0**-149) * 31])])
    values = (every if dtype != torch.bfloat16 else every.view(torch.bfloat16)).clone()
    values = values[torch.isfinite(values) & (values.abs() < 1e15)]
    values = torch.cat([values, values[::3], values[::3], torch.zeros(7, dtype=dtype)])
    values = values[: len(values) // 2 * 2].reshape(2, -1).T  # not contiguous
    loss = scaling_loss(values, scale)
    before, exact, after = values.double(), values.double() * scale, (values * scale).double()
    smallest = torch.finfo(dtype).smallest_normal
    assert loss.values == values.numel()
    assert loss.became_zero == int(((after == 0) & (before != 0)).sum()) > 0
    subnormal = (before.abs() >= smallest) & (after.abs() < smallest) & (after != 0)
    assert loss.became_subnormal == int(subnormal.sum()) > 0
    assert loss.squared_error == pytest.approx(float((after - exact).square().sum()) / scale**2, rel=1e-12, abs=0)
    assert loss.squared_sum == pytest.approx(float(before.square().sum()), rel=1e-12)


def test_the_losses_of_all_tensors_are_told_and_summed():
    lost = ScalingLoss(values=100, became_subnormal=3, became_zero=2, squared_error=1.0, squared_sum=16.0)
    whole = ScalingLoss(values=50, squared_sum=4.0)
    assert report({"a": lost, "b": whole, "c": lost}, 0.25) == {
        "residual_scale": 0.25,
        "values": 250,
        "became_subnormal": 6,
        "became_zero": 4,
        "largest_relative_error": 0.25,
        "by_tensor": [
            {"tensor": name, "values": 100, "became_subnormal": 3, "became_zero": 2, "relative_error": 0.25}
            for name in ("a", "c")
        ],
    }
    assert report({}, 1.0)["largest_relative_error"] == 0.0


def test_nothing_is_lost_of_nothing():
    assert scaling_loss(torch.zeros(0, dtype=torch.float16), 0.5).values == 0


def test_underflow_is_reported_and_its_bound_fails(massive, tmp_path):
    """A bias of small values in a layer: reported where float16 can take it, refused where it cannot."""
    name = "model.layers.1.self_attn.o_proj.bias"
    for size, refused in ((2e-2, False), (1e-4, True)):
        source = tmp_path / str(size) / "source"
        shutil.copytree(massive, source)
        edit_shard(source, 1, lambda tensors, size=size: tensors[name].copy_(embedded.random_tensor("b", (192,), std=size)))
        model, artifacts = local(source, source.parent / "artifacts")
        if refused:
            with pytest.raises(UserError, match=f"loses too much: {re.escape(name)}: got a relative error"):
                convert(model, artifacts, RequantOptions(), "float16")
            assert not artifacts.dense_weights.exists()
        else:
            fetch(model, artifacts)
            report = normalize(open_source(model, artifacts), artifacts, RequantOptions(), "float16")["scaling"]
            assert report["residual_scale"] == AUTO_FLOAT16
            (lost,) = [each for each in report["by_tensor"] if each["tensor"] == name]
            assert lost["became_subnormal"] > 0
            assert 0 < report["largest_relative_error"] < 2**-11


def test_another_scale_changes_no_weight(massive, tmp_path):
    made = {}
    for scale in ("auto", 1):
        model, artifacts = local(massive, tmp_path / str(scale))
        report = convert(model, artifacts, RequantOptions(), "float16", scale)
        assert report["different"] == 0
        made[scale] = artifacts.checkpoint
    for file in sorted(made[1].iterdir()):
        assert (file.read_bytes() == (made["auto"] / file.name).read_bytes()) == (file.name != "config.json")
    recorded = {s: read_json_object(made[s] / "config.json")["quantization_config"]["residual_scale"] for s in made}
    assert recorded == {"auto": AUTO_FLOAT16, 1: 1.0}


@pytest.mark.slow
def test_float16_scaled_is_as_close_to_float32_as_bfloat16(massive, tmp_path, capsys):
    """And plain float16 is NaN: the model is made so. The scale in float32 shows that eps is scaled with it."""
    plain, scaled, bfloat16, float32 = ("float16", 1), ("float16", "auto"), ("bfloat16", "auto"), ("float32", AUTO_FLOAT16)
    found = agreements(massive, tmp_path, ENGINE, (plain, scaled, bfloat16, float32), warm_vllm.run)
    with capsys.disabled():
        for row in rows("tiny_massive", found):
            print("\n" + ", ".join(map(str, row)), end="")
    assert found[plain] is None
    assert found[scaled].worst_difference <= found[bfloat16].worst_difference
    assert found[scaled].agreeing >= found[bfloat16].agreeing
    assert found[float32].worst_difference < 1e-3
    assert found[float32].agreeing == found[float32].positions


def test_smoke_says_what_to_do_about_values_that_are_not_finite(massive, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "stages")
    require_finite = runpy.run_path(str(ROOT / "stages/smoke.py"))["require_finite"]
    fine = Generation("", "", [1, 2], 1, [{}, {2: -1.0}])
    bad = Generation("", "", [1, 2], 1, [{}, {2: float("nan")}])
    for scale, advice in ((1, "residual_scale=auto"), ("auto", f"residual_scale={2.0**-10!r}")):
        model, artifacts = local(massive, tmp_path / str(scale))
        convert(model, artifacts, RequantOptions(), "float16", scale)
        require_finite([fine], artifacts.checkpoint)
        with pytest.raises(UserError, match=re.escape(advice)) as caught:
            require_finite([fine, bad], artifacts.checkpoint)
        assert "1 of 2 prompts" in str(caught.value)
        assert "dtype=bfloat16" in str(caught.value)


def test_what_does_not_know_of_the_scale_is_refused():
    from gptoss_nf4.vllm.model import refuse_unscaled_access

    def config(lora=None, embeds=False, eagle=None):
        return SimpleNamespace(
            lora_config=lora, speculative_config=eagle, model_config=SimpleNamespace(model="m", enable_prompt_embeds=embeds)
        )

    refuse_unscaled_access(config())
    refuse_unscaled_access(config(eagle=SimpleNamespace(use_eagle=lambda: False)))
    for asked_for, named in (
        ({"embeds": True}, "prompt embeddings"),
        ({"eagle": SimpleNamespace(use_eagle=lambda: True)}, "EAGLE"),
    ):
        with pytest.raises(UserError, match=named):
            refuse_unscaled_access(config(**asked_for))

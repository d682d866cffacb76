"""Merging an adapter: against PEFT's own merge and against float64, quantized by bitsandbytes; the rest stays exact."""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from adapter_makers import ATTENTION, EXPERTS, PREFIX, ROUTER, Tensors, grouped, split, weights_of, with_adapter
from conftest import edit_shard, local, make_dense
from halves import thinned
from project_imports import ROOT
from proof_cases import config_changed, proved, rewritten
from proof_mutations import LAYER, OF_TENSORS, last_bit, one_code
from safetensors.torch import load_file, save_file
from whole_model import whole_model

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.canonical import Delta
from gptoss_nf4.check import merge as checking
from gptoss_nf4.check.merge import changed_weights, losses, nearest_codes, require_merged
from gptoss_nf4.check.weights import stored_weight
from gptoss_nf4.convert.merge import Merge, merged
from gptoss_nf4.convert.plan import EXACT, NF4, RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.flow import convert
from gptoss_nf4.format.rows import CONCATENATED, INTERLEAVED
from gptoss_nf4.proof.config import Asked
from gptoss_nf4.samples.embedded import TINY
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.reading import read_json_object

sys.path.insert(0, str(ROOT / "stages"))
MINE = RequantOptions(mode=NF4, merge="mine")
ALL = {"target_modules": ATTENTION, "target_parameters": EXPERTS + ROUTER}
PARTS = {  # of a fused tensor of a layer, by what the source calls them
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.experts.w13": [f"mlp.experts.gate_up_projs.{e}" for e in range(TINY.experts)],
    "mlp.experts.w2": [f"mlp.experts.down_projs.{e}" for e in range(TINY.experts)],
}


def save_adapter(source: Path, directory: Path, size: float = 0.1, **lora) -> Tensors:
    """An adapter of PEFT's on `source`, saved; what PEFT's merge makes of all weights, by name."""
    model = with_adapter(whole_model(source), **lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(size / 0.3)  # the makers draw them with 0.3
    model.save_pretrained(directory)
    return weights_of(model.merge_and_unload())


def rewrite(directory: Path, change: Callable[[Tensors], Tensors], **fields) -> None:
    file, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    save_file({name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def result_of(source: Path, root: Path, adapter: Path | None, options: RequantOptions, dtype="float32"):
    model, artifacts = local(source, root)
    report = convert(model, artifacts, options, dtype, adapter=Adapter(adapter) if adapter else None)
    return Checkpoint(artifacts.checkpoint), report


def part_of(result: Checkpoint, layer: int, target: str, number: int, order: str = INTERLEAVED) -> tuple:
    """(codes, absmax) of one part, in the source's order of rows, cut out by this test's own arithmetic."""
    weight = f"model.layers.{layer}.{target}.weight"
    codes, absmax = result.torch(weight), result.torch(f"{weight}.absmax")
    if "experts" in target:
        codes, absmax = codes[number], absmax[number]
        if order == CONCATENATED and target.endswith("w13"):
            half = len(codes) // 2
            rows = [row // 2 + (row % 2) * half for row in range(2 * half)]  # gate rows are the even ones
            codes, absmax = codes[rows], absmax[rows]
    elif target.endswith("qkv_proj"):
        sizes = [TINY.q_rows, TINY.kv_rows, TINY.kv_rows]
        codes, absmax = codes.split(sizes)[number], absmax.split(sizes)[number]
    return codes, absmax


def merged_weight(weights: Tensors, layer: int, target: str, number: int) -> torch.Tensor:
    """The same part of what PEFT merged."""
    if "experts" in target:
        return weights[f"model.layers.{layer}.{target}"][number]
    return weights[f"model.layers.{layer}.{PARTS[target][number]}"]


EVERY_WEIGHT = TINY.layers * TINY.hidden * (2 * TINY.q_rows + 2 * TINY.kv_rows + 3 * TINY.intermediate * TINY.experts)


def weights_compared(report: dict) -> int:
    """Of attention and experts, by the proof."""
    kinds = ("attention_weight", "w13_weight", "w2_weight")
    return sum(each["compared"] for each in report["by_kind"] if each["kind"] in kinds)


def all_parts():
    return [
        (layer, target, i) for layer in range(TINY.layers) for target, parts in PARTS.items() for i in range(len(parts))
    ]


FORMS = {
    "peft": (lambda tensors: tensors, {}),
    "grouped by expert": (lambda tensors: grouped(tensors, TINY.experts), {"lora_B_layout": "grouped_by_expert"}),
    "unsloth": (
        lambda tensors: {
            name.replace("mlp.router.", "mlp.router.linear."): tensor
            for name, tensor in split(tensors, TINY.experts).items()
        },
        {"target_modules": [*ATTENTION, "gate_up_projs", "down_projs", "linear"], "target_parameters": None},
    ),
}


@pytest.mark.parametrize(
    ("form", "order"), thinned([("unsloth", CONCATENATED), ("peft", INTERLEAVED), ("grouped by expert", INTERLEAVED)], 3)
)
def test_every_form_is_merged_as_peft_does(tiny, tmp_path, form, order):
    """Float32 sums in another order may move a weight across the middle between two codes: one in ten thousand at most."""
    expected = save_adapter(tiny, tmp_path / "mine", **ALL)
    change, fields = FORMS[form]
    rewrite(tmp_path / "mine", change, **fields)
    options = RequantOptions(mode=NF4, merge="mine", w13_order=order)
    result, report = result_of(tiny, tmp_path / "artifacts", tmp_path / "mine", options)
    for layer, target, number in all_parts():
        codes, absmax = part_of(result, layer, target, number, order)
        weight = merged_weight(expected, layer, target, number)
        packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
        torch.testing.assert_close(absmax.flatten(), state.absmax, rtol=1e-5, atol=0)
        assert (codes.flatten() != packed.flatten()).sum() <= 1e-4 * packed.numel()
    for layer in range(TINY.layers):
        router = f"model.layers.{layer}.mlp.router"
        torch.testing.assert_close(result.torch(f"{router}.weight"), expected[router], rtol=1e-5, atol=1e-6)
    assert result.config["quantization_config"]["merged_adapter"] == {
        "name": "mine",
        "sha256": hashlib.sha256((tmp_path / "mine/adapter_model.safetensors").read_bytes()).hexdigest(),
    }
    assert (weights_compared(report), report["different"], report["merge"]["total"]["unexplained"]) == (0, 0, 0)


def test_codes_are_bitsandbytes_own_bit_for_bit(tiny, tmp_path):
    """A and B in so few bits that B @ A is exact in float32: then the sum is that of float64, rounded once."""
    save_adapter(tiny, tmp_path / "mine", **ALL | {"r": 4, "lora_alpha": 2})
    rewrite(tmp_path / "mine", lambda tensors: {name: (tensor * 64).round() / 64 for name, tensor in tensors.items()})
    tensors = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    result, _ = result_of(tiny, tmp_path / "artifacts", tmp_path / "mine", MINE)
    before = weights_of(whole_model(tiny))

    def delta(layer: int, target: str, number: int) -> torch.Tensor:
        name = PARTS[target][number] if "experts" not in target else target
        stem = {"mlp.experts.w13": "mlp.experts.base_layer", "mlp.experts.w2": "mlp.experts"}.get(name, name)
        a, b = (tensors[f"{PREFIX}{layer}.{stem}.lora_{side}.weight"].double() for side in "AB")
        if "experts" in target:  # PEFT: row e * r + j of lora_A, column j * E + e of lora_B
            a, b = a[number * 4 : number * 4 + 4], b[:, number :: TINY.experts]
        return b @ a / 2

    for layer, target, number in all_parts():
        weight = merged_weight(before, layer, target, number).double() + delta(layer, target, number)
        packed, state = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
        codes, absmax = part_of(result, layer, target, number)
        assert torch.equal(codes.flatten(), packed.flatten())
        assert torch.equal(absmax.flatten(), state.absmax)


def test_what_the_adapter_leaves_alone_stays_bit_for_bit(tiny, tmp_path):
    """q of layer 0, and expert 3's gate_up of layer 1: no other part may differ from the exact conversion."""
    save_adapter(tiny, tmp_path / "mine", target_modules=["q_proj"], target_parameters=EXPERTS)
    config = {"target_modules": ["q_proj", "gate_up_projs"], "target_parameters": None}
    wanted = ("layers.0.self_attn.q_proj.", "layers.1.mlp.experts.gate_up_projs.3.")

    def only_two(tensors: Tensors) -> Tensors:
        return {n: t for n, t in split(tensors, TINY.experts).items() if any(part in n for part in wanted)}

    rewrite(tmp_path / "mine", only_two, **config)
    exact, _ = result_of(tiny, tmp_path / "exact", None, RequantOptions())
    result, report = result_of(tiny, tmp_path / "artifacts", tmp_path / "mine", MINE)
    differing = [
        (layer, PARTS[target][number])
        for layer, target, number in all_parts()
        if not all(map(torch.equal, part_of(result, layer, target, number), part_of(exact, layer, target, number)))
    ]
    changed = {0: "self_attn.q_proj", 1: "mlp.experts.gate_up_projs.3"}
    assert differing == list(changed.items())
    for name in exact.tensors:
        if name.endswith((".bias", "norm.weight", "sinks", "router.weight", "embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(result.torch(name), exact.torch(name))
    for layer, name in changed.items():
        handled = read_json_object(tmp_path / f"artifacts/reports/layer-{layer}.json")["modules"]
        assert handled["merged and quantized again"] == [f"model.layers.{layer}.{name}"]
        assert len(handled["moved"]) == sum(map(len, PARTS.values())) - 1
    assert [each["kind"] for each in report["merge"]["kinds"]] == ["q_proj", "w13"]
    changed_weights = TINY.q_rows * TINY.hidden + 2 * TINY.intermediate * TINY.hidden
    assert report["merge"]["total"]["weights"] == changed_weights
    assert (weights_compared(report), report["different"]) == (EVERY_WEIGHT - changed_weights, 0)


def test_another_format_quantizes_all_and_says_so(tiny, tmp_path):
    save_adapter(tiny, tmp_path / "mine", target_modules=["q_proj"])
    options = RequantOptions(mode=NF4, merge="mine", blocksize=32)
    result, report = result_of(tiny, tmp_path / "artifacts", tmp_path / "mine", options)
    weight = stored_weight(Checkpoint(tiny), "model.layers.0.mlp.experts.down_projs.5.weight")
    packed, _ = bnb.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    assert torch.equal(part_of(result, 0, "mlp.experts.w2", 5)[0].flatten(), packed.flatten())
    handled = read_json_object(tmp_path / "artifacts/reports/layer-0.json")["modules"]
    assert handled.keys() == {"merged and quantized again", "quantized again"}
    w2 = next(each for each in report["merge"]["kinds"] if each["kind"] == "w2")
    assert (w2["relative_delta"], w2["delta_kept"]) == (0, None)
    assert report["merge"]["total"]["weights"] == EVERY_WEIGHT
    assert report["merge"]["total"]["unexplained"] == 0
    assert weights_compared(report) == EVERY_WEIGHT - TINY.layers * TINY.q_rows * TINY.hidden


def test_dense_modules_are_merged_before_they_are_rounded(source_copy, tmp_path):
    """o_proj left in 16 bit by the source, and k_proj, for which all of q, k and v are joined dense."""
    for layer, module in ((0, "o_proj"), (1, "k_proj")):
        edit_shard(source_copy, layer, lambda t, name=f"model.layers.{layer}.self_attn.{module}": make_dense(t, name))
    expected = save_adapter(source_copy, tmp_path / "mine", target_modules=ATTENTION)
    result, report = result_of(source_copy, tmp_path / "artifacts", tmp_path / "mine", MINE)
    qkv = torch.cat([expected[f"model.layers.1.self_attn.{x}_proj"] for x in "qkv"])
    for name, weight in (
        ("0.self_attn.o_proj", expected["model.layers.0.self_attn.o_proj"]),
        ("1.self_attn.qkv_proj", qkv),
    ):
        torch.testing.assert_close(result.torch(f"model.layers.{name}.weight"), weight, rtol=1e-5, atol=1e-6)
    assert report["merge"]["layers"][1]["q_proj"]["relative_rms_error"] < 1e-6
    assert report["merge"]["layers"][0]["q_proj"]["relative_rms_error"] > 0.01
    assert report["different"] == 0


@pytest.mark.parametrize(("size", "left"), thinned([(0.05, (0.35, 0.45)), (0.03, (0, 0.05)), (0.08, (0.9, 1))], 3))
def test_the_figures_are_those_of_float64(tiny, tmp_path, size, left):
    """A delta of 2 % of the weights is lost nearly whole: the sum rounds back to the codes that the base has."""
    merged = save_adapter(tiny, tmp_path / "mine", size, target_parameters=["mlp.experts.gate_up_proj"])
    result, report = result_of(tiny, tmp_path / "artifacts", tmp_path / "mine", MINE)
    name = "model.layers.1.mlp.experts.w13"
    base = weights_of(whole_model(tiny))[name].double()
    delta, stored = merged[name].double() - base, stored_weight(result, f"{name}.weight").double()
    error = stored - merged[name].double()
    found = report["merge"]["layers"][1]["w13"]
    print(found)  # docs/adapters.md has these
    assert found["relative_delta"] == pytest.approx(float(delta.norm() / base.norm()), rel=1e-4)
    assert found["relative_rms_error"] == pytest.approx(float(error.norm() / merged[name].norm()), rel=1e-4)
    assert found["error_by_delta"] == pytest.approx(float(error.norm() / delta.norm()), rel=1e-4)
    assert found["largest_error"] == pytest.approx(float(error.abs().max()), rel=1e-4)
    assert found["delta_kept"] == pytest.approx(float(((stored - base) * delta).sum() / delta.square().sum()), rel=1e-3)
    assert left[0] <= found["delta_kept"] <= left[1]


def test_an_untrained_adapter_changes_nothing(tiny, tmp_path):
    """lora_B as training begins, all zeros."""
    save_adapter(tiny, tmp_path / "mine", **ALL)
    rewrite(tmp_path / "mine", lambda tensors: {n: t * ("lora_A" in n) for n, t in tensors.items()})
    exact, _ = result_of(tiny, tmp_path / "exact", None, RequantOptions())
    result, report = result_of(tiny, tmp_path / "artifacts", tmp_path / "mine", MINE)
    assert all(torch.equal(result.torch(name), exact.torch(name)) for name in exact.tensors)
    assert report["merge"]["kinds"] == []


@dataclass
class Case:
    """A merged result in float16, and what is asked of it."""

    source: Path
    result: Path
    merge: Merge
    asked: Asked

    def check(self, result: Path) -> None:
        """What stage prove does. UserError where it finds something."""
        proved(self.source, result, self.asked)
        require_merged(losses(open_checkpoint(self.source), Checkpoint(result), self.merge, MINE, "float16"), result)


def case_of(source: Path, root: Path, **lora) -> Case:
    save_adapter(source, root / "mine", **lora)
    model, artifacts = local(source, root / "artifacts")
    adapter = Adapter(root / "mine")
    convert(model, artifacts, MINE, "float16", adapter=adapter)
    opened = open_source(model, artifacts)
    merge = pickle.loads(pickle.dumps(Merge(adapter, opened.dimensions)))  # as a worker gets it
    asked = Asked(
        "nf4", INTERLEAVED, "nf4", 64, "float16", "auto", merge.recorded("mine"), changed_weights(opened, merge, MINE)
    )
    return Case(source, artifacts.checkpoint, merge, asked)


@pytest.fixture(scope="module")
def little(tiny, tmp_path_factory) -> Case:
    """k_proj of layer 0 alone is merged: all of layer 1, which the mutations change, is untouched."""
    root = tmp_path_factory.mktemp("little")
    return case_of(tiny, root, target_modules=["k_proj"], layers_to_transform=[0])


@pytest.fixture(scope="module")
def much(tiny, tmp_path_factory) -> Case:
    return case_of(tiny, tmp_path_factory.mktemp("much"), **ALL)


@pytest.mark.parametrize("mutation", thinned(OF_TENSORS, 4))
def test_what_the_adapter_leaves_alone_is_proved_as_without_it(little, tmp_path, mutation):
    change, named = OF_TENSORS[mutation]
    with pytest.raises(UserError, match=named):
        proved(little.source, rewritten(little.result, tmp_path / "result", change), little.asked)


def test_an_unchanged_one_passes(little, much, tmp_path):
    """So the tests above and below could fail."""
    for number, case in enumerate((little, much)):
        case.check(rewritten(case.result, tmp_path / str(number), dict))


W13, ROUTER_WEIGHT, QKV = (f"{LAYER}{name}.weight" for name in ("mlp.experts.w13", "mlp.router", "self_attn.qkv_proj"))
TOO_SMALL = [*(name for name in OF_TENSORS if name.startswith("one absmax")), f"last bit of {ROUTER_WEIGHT}"]  # rounding
OF_THE_MERGED = {name: OF_TENSORS[name][0] for name in OF_TENSORS if name not in TOO_SMALL} | {
    "next code of one weight": lambda t: one_code(t, W13),
    "scales of one expert": lambda t: t[f"{W13}.absmax"][3].mul_(1.01),
    "NaN in a scale": lambda t: t[f"{QKV}.absmax"].view(-1)[7:8].fill_(torch.nan),
    "NaN in the router": lambda t: t[ROUTER_WEIGHT].view(-1)[7:8].fill_(torch.nan),
    "one value of the router": lambda t: t[ROUTER_WEIGHT].view(-1)[7:8].mul_(1.01),
}


@pytest.mark.parametrize("mutation", thinned(OF_THE_MERGED, 6))
def test_a_merged_weight_is_what_is_stored_for_the_sum(much, tmp_path, mutation):
    """All weights of attention, experts and router are merged: nothing of them may be another, and no bias and no norm."""
    with pytest.raises(UserError):
        much.check(rewritten(much.result, tmp_path / "result", OF_THE_MERGED[mutation]))


def test_a_result_without_the_adapter_is_not_the_merge(tiny, much, tmp_path):
    exact, _ = result_of(tiny, tmp_path / "exact", None, RequantOptions(), "float16")
    section = {"requant_mode": "nf4", "merged_adapter": much.asked.merged_adapter}
    result = config_changed(exact.directory, tmp_path / "result", lambda c: c["quantization_config"].update(section))
    with pytest.raises(UserError, match=r"not the merged weights.*q_proj.*w13.*router"):
        much.check(result)


@pytest.mark.parametrize("found", [None, "mine", {"name": "other"}])
def test_config_json_names_the_adapter_where_one_is_merged_and_only_there(tiny, little, tmp_path, found):
    section = {"merged_adapter": found}
    changed = config_changed(little.result, tmp_path / "changed", lambda c: c["quantization_config"].update(section))
    with pytest.raises(UserError, match=r"quantization_config\.merged_adapter"):
        proved(tiny, changed, little.asked)
    with pytest.raises(UserError, match=r"quantization_config\.merged_adapter"):
        proved(tiny, little.result, replace(little.asked, merged_adapter=None))


def test_only_weights_can_be_left_out(tiny, little, tmp_path):
    """Whatever is asked: a bias, a norm or the head is compared."""
    for number, name in enumerate((f"{LAYER}self_attn.qkv_proj.bias", f"{LAYER}input_layernorm.weight", "lm_head.weight")):
        result = rewritten(little.result, tmp_path / str(number), lambda t, name=name: last_bit(t, name))
        with pytest.raises(UserError, match=name):
            proved(tiny, result, replace(little.asked, changed=little.asked.changed | {(name, i) for i in range(8)}))


@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("fp4", 32)])
def test_the_nearest_code_is_the_one_that_bitsandbytes_takes(quant_type, blocksize):
    weights = torch.randn(64, 192, generator=torch.Generator().manual_seed(5))
    weights[3] = 0
    packed, state = bnb.quantize_4bit(weights, blocksize=blocksize, quant_type=quant_type)
    expected = bnb.dequantize_4bit(packed, state).double()
    found = nearest_codes(weights.double(), quant_type, blocksize)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_sum_that_cannot_be_served_is_refused_by_name(tiny, tmp_path):
    save_adapter(tiny, tmp_path / "mine", target_modules=["k_proj"])
    rewrite(tmp_path / "mine", lambda tensors: {name: tensor * 1e25 for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=r"merged weight too large: model\.layers\.0\.self_attn\.k_proj"):
        result_of(tiny, tmp_path / "artifacts", tmp_path / "mine", MINE)
    assert not (tmp_path / "artifacts/checkpoint/layer-0.safetensors").exists()


@pytest.mark.parametrize(
    ("layers", "experts", "cores", "workers"), [(4, 64, 3, 3), (2, 128, 8, 2), (3, 85, 8, None), (4, 64, 1, None)]
)
def test_layers_of_many_experts_are_spread_over_processes_in_order(monkeypatch, layers, experts, cores, workers):
    """Of fewer than 256 they are not. A worker is started anew, not forked, with one thread of torch."""
    made: list[tuple] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, context, initializer, initargs):
            made.append((workers, context.get_start_method(), initializer, initargs))
            super().__init__(workers)

    monkeypatch.setattr(checking, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(checking, "cores", lambda: cores)
    source = SimpleNamespace(dimensions=SimpleNamespace(layers=layers, experts=experts))
    assert checking._by_layer(lambda layer: 10 * layer, source) == [0, 10, 20, 30][:layers]
    assert made == ([] if workers is None else [(workers, "spawn", torch.set_num_threads, (1,))])


@pytest.mark.parametrize("weight", [65_504.0, -65_504.0, 65_505.0, -65_505.0, float("nan"), float("-inf")])
def test_a_sum_has_to_fit_into_float16(weight):
    delta = Delta("there", torch.zeros(1, 2), torch.zeros(3, 1))
    base = torch.tensor([[0.0, 1.0], [weight, 0.0], [1.0, 2.0]])
    if abs(weight) <= 65_504:
        assert torch.equal(merged(base, delta), base)
    else:
        with pytest.raises(UserError, match="merged weight too large: there"):
            merged(base, delta)


def test_mode_exact_is_refused():
    with pytest.raises(UserError, match=r"requant\.merge: got mine with requant\.mode=exact.*requant\.mode=nf4"):
        RequantOptions(mode=EXACT, merge="mine")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["requant.merge=mine"], r"requant\.merge: got 'mine', expected an adapter, and adapters has none"),
        (["adapters={other: ADAPTER}", "requant.merge=mine"], r"got 'mine', expected one of adapters, \['other'\]"),
        (["adapters={mine: ADAPTER}", "requant.merge=mine"], r"got mine with requant\.mode=exact"),
    ],
)
def test_configure_refuses_at_once(tmp_path, arguments, named):
    from configure import composed

    with pytest.raises(UserError, match=named):
        composed([argument.replace("ADAPTER", str(tmp_path)) for argument in arguments])


def test_a_merged_result_has_a_name_of_its_own(tiny, tmp_path):
    """The adapter named, or given as the model; and its stages depend on the adapter, which those of no merge do not."""
    from configure import composed

    adapter = tmp_path / "mine"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    unmerged = composed(["model=local", f"model.path={tiny}", f"adapters={{mine: {adapter}}}"])
    assert (unmerged.model.name, unmerged.merge_input) == ("source", "stages/common.py")
    merging = ["requant.mode=nf4", "requant.merge=mine"]
    for given in ([f"model.path={tiny}", f"adapters={{mine: {adapter}}}"], [f"model.path={adapter}"]):
        cfg = composed(["model=local", *given, *merging])
        assert (cfg.model.name, cfg.model.path) == ("source-mine", str(tiny))
        assert cfg.merge_input == "artifacts/source-mine/adapters/mine.json"

"""Every form of adapter, against PEFT: the base's weights plus our deltas are the weights that PEFT merges."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_makers import (
    ATTENTION,
    EXPERTS,
    PREFIX,
    ROUTER,
    SMALL,
    SQUARE,
    Made,
    SplitModel,
    fused_model,
    grouped,
    make_swapped,
    split,
    swapped,
    weights_of,
    with_adapter,
)

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.canonical import Delta, deltas
from gptoss_nf4.adapters.config import AdapterConfig
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions

TOLERANCE = 1e-4  # relative, of float32 sums in another order
ALL = {"target_modules": ATTENTION, "target_parameters": EXPERTS + ROUTER}
FUSED = {"target_parameters": EXPERTS}


def read(directory: Path, d: Dimensions = SMALL) -> dict[str, Delta]:
    return {name: delta for _, found in Adapter(directory).layers(d) for name, delta in found.items()}


def errors(made: Made, d: Dimensions = SMALL) -> dict[str, float]:
    """|before + b @ a - after| / |after - before| of each weight that PEFT changed; no other may have a delta."""
    found = read(made.directory, d)
    changed = {name for name, before in made.before.items() if not torch.equal(before, made.after[name])}
    assert found.keys() == changed
    assert changed
    result = {}
    for name, delta in found.items():
        assert delta.a.dtype == delta.b.dtype == torch.float32
        assert delta.name == name
        before, after = made.before[name], made.after[name]
        result[name] = float((before + delta.b @ delta.a - after).norm() / (after - before).norm())
    return result


def right(made: Made, d: Dimensions = SMALL) -> bool:
    return max(errors(made, d).values()) <= TOLERANCE


PEFT_CASES = {
    "attention": {"target_modules": ATTENTION},
    "all": ALL,
    "experts": FUSED,
    "gate_up alone": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down alone": {"target_parameters": ["experts.down_proj"]},
    "gate_up of layer 0, down of layer 1": {
        "target_parameters": ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    },
    "router": {"target_parameters": ROUTER},
    "attention as parameters": {"target_parameters": ["self_attn.q_proj.weight"], "rank_pattern": {"q_proj.weight": 3}},
    "rslora": ALL | {"use_rslora": True},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj"},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "patterns": ALL
    | {
        "rank_pattern": {
            "q_proj": 2,
            "^model.layers.1.self_attn.k_proj": 5,
            r".*experts\.down_proj": 3,
            "router.weight": 1,
            "layers.0.mlp.experts.gate_up_proj": 7,
        },
        "alpha_pattern": {"v_proj": 1, "experts.gate_up_proj": 16, r"layers\.[01]\.mlp\.router\.weight": 3},
    },
    "patterns, rslora": ALL
    | {"use_rslora": True, "rank_pattern": {"experts.down_proj": 9}, "alpha_pattern": {"o_proj": 2}},
}


@pytest.mark.parametrize("lora", PEFT_CASES.values(), ids=PEFT_CASES)
def test_what_peft_saves(lora, tmp_path):
    assert right(Made(fused_model(SMALL), tmp_path, **lora))


@pytest.mark.parametrize("lora", [ALL, PEFT_CASES["patterns"]], ids=["all", "patterns"])
def test_logits_of_the_model(lora, tmp_path):
    """The whole model: PEFT's, not merged, against transformers' with our deltas on its weights."""
    tokens = torch.arange(24).reshape(2, 12) % SMALL.vocabulary
    peft_model = with_adapter(fused_model(SMALL), **lora)
    peft_model.save_pretrained(tmp_path)
    model = fused_model(SMALL)
    with torch.no_grad():
        expected, base = peft_model(tokens).logits, model(tokens).logits
        for name, delta in read(tmp_path).items():
            change = delta.b @ delta.a
            layer = model.model.layers[int(name.split(".")[2])]
            if name.endswith("w13"):
                layer.mlp.experts.gate_up_proj += change.transpose(1, 2)
            elif name.endswith("w2"):
                layer.mlp.experts.down_proj += change.transpose(1, 2)
            elif name.endswith("router"):
                layer.mlp.router.weight += change
            else:
                getattr(layer.self_attn, name.rpartition(".")[2]).weight.add_(change)
        got = model(tokens).logits
    assert (expected - base).norm() > 0.1 * base.norm()
    assert (got - expected).norm() <= TOLERANCE * expected.norm()


# Where Unsloth writes which order lora_B has; the last is that of its saves without a mark.
DETAIL = {"parameters": {name: {"lora_B_layout": "grouped_by_expert"} for name in ("gate_up_proj", "down_proj")}}
MARKS = {
    "flat": {"lora_B_layout": "grouped_by_expert"},
    "nested": {"unsloth_fused_expert_lora": DETAIL},
    "nested before flat": {"unsloth_fused_expert_lora": DETAIL, "lora_B_layout": "rank_major"},
    "in auto_mapping": {"auto_mapping": {"lora_B_layout": "grouped_by_expert"}},
    "nested in auto_mapping": {"auto_mapping": {"unsloth_fused_expert_lora": DETAIL}},
    "Unsloth without a mark": {"auto_mapping": {"unsloth_fixed": True}},
}


@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_columns_grouped_by_expert(mark, tmp_path):
    made = Made(fused_model(SMALL), tmp_path, **ALL)
    made.rewrite(lambda tensors: grouped(tensors, SMALL.experts))
    assert not right(made)
    made.rewrite(**mark)
    assert right(made)


def test_columns_grouped_in_one_parameter_only(tmp_path):
    made = Made(fused_model(SMALL), tmp_path, **FUSED)

    def change(tensors):
        inner = {key for key in tensors if "base_layer" in key}
        return tensors | {key: value for key, value in grouped(tensors, SMALL.experts).items() if key in inner}

    layouts = {"gate_up_proj": {"lora_B_layout": "grouped_by_expert"}, "down_proj": {"lora_B_layout": "rank_major"}}
    made.rewrite(change, unsloth_fused_expert_lora={"parameters": layouts})
    assert right(made)


@pytest.mark.parametrize(
    "mark", [{"lora_B_layout": "rank_major"}, {"target_parameters": None}], ids=["marked", "no targets"]
)
def test_unsloth_does_not_always_mean_grouped(mark, tmp_path):
    made = Made(fused_model(SMALL), tmp_path, **FUSED)
    made.rewrite(auto_mapping={"unsloth_fixed": True}, **mark)
    assert right(made)


@pytest.mark.parametrize(
    "lora", [FUSED, PEFT_CASES["gate_up alone"], PEFT_CASES["down alone"]], ids=["both", "gate", "down"]
)
@pytest.mark.parametrize("by_peft", [True, False])
def test_swapped(lora, by_peft, tmp_path):
    """transformers 4.57 with PEFT 0.19.1 or newer: by PEFT itself on such a model, and made of a straight adapter."""
    model = fused_model(SMALL)
    made = Made(make_swapped(model) if by_peft else model, tmp_path, **lora)
    shapes = {key: tensor.shape for key, tensor in made.tensors.items()}
    if not by_peft:
        made.rewrite(lambda tensors: swapped(tensors, SMALL.experts))
        assert {key: tensor.shape for key, tensor in made.tensors.items()} != shapes
    assert right(made)


def test_swapped_and_grouped(tmp_path):
    made = Made(make_swapped(fused_model(SMALL)), tmp_path, **FUSED)
    made.rewrite(lambda tensors: grouped(tensors, SMALL.experts), lora_B_layout="grouped_by_expert")
    assert right(made)


@pytest.mark.parametrize("is_swapped", [True, False])
def test_square_down_proj_follows_gate_up(is_swapped, tmp_path):
    model = fused_model(SQUARE)
    assert right(Made(make_swapped(model) if is_swapped else model, tmp_path, **FUSED), SQUARE)


@pytest.mark.parametrize(
    ("peft", "transformers", "is_swapped"),
    [
        ("0.17.1", None, False),
        ("0.18.0.dev0@1a2b3c", None, False),
        ("0.19.0", "4.57.6", False),
        ("0.19.0", "5.0.0", True),
        ("0.19.1", "4.57.6", True),
        ("0.21.2", "5.24.0", False),
        ("0.21", "5", None),
        ("0.21.2", None, None),
        (None, None, None),
    ],
)
def test_square_down_proj_alone_goes_by_versions(peft, transformers, is_swapped, tmp_path):
    """As read in PEFT 0.18.1, 0.19.0, 0.19.1 and transformers 4.57.6, 5.0.0; where they do not tell, it is refused."""
    model = fused_model(SQUARE)
    made = Made(make_swapped(model) if is_swapped else model, tmp_path, **PEFT_CASES["down alone"])
    made.rewrite(peft_version=peft, transformers_version=transformers)
    if is_swapped is None:
        with pytest.raises(UserError, match="transformers_version"):
            read(tmp_path, SQUARE)
    else:
        assert right(made, SQUARE)


def test_a_module_for_each_expert(tmp_path):
    """Unsloth's keys, of a fused adapter of PEFT's whose meaning is known."""
    made = Made(fused_model(SMALL), tmp_path, **ALL)
    made.rewrite(lambda tensors: split(tensors, SMALL.experts))
    assert f"{PREFIX}1.mlp.experts.gate_up_projs.2.lora_B.weight" in made.tensors
    assert right(made)


SPLIT_CASES = {
    "all": {"target_modules": r".*(_proj|_projs\.\d+|linear)"},
    "router": {"target_modules": ["router.linear"]},
    "some experts": {"target_modules": ["gate_up_projs.2", "model.layers.1.mlp.experts.down_projs.0"]},
    "unequal ranks and alphas": {
        "target_modules": r".*_projs\.\d+",
        "rank_pattern": {"gate_up_projs.1": 7, "model.layers.0.mlp.experts.down_projs.2": 1, r"layers\.1\..*projs\.0": 2},
        "alpha_pattern": {"gate_up_projs.0": 1, "down_projs.1": 20},
    },
    "unequal, rslora": {
        "target_modules": r".*_projs\.\d+",
        "rank_pattern": {"gate_up_projs.1": 7},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("lora", SPLIT_CASES.values(), ids=SPLIT_CASES)
def test_modules_of_unsloths_model(lora, tmp_path):
    """Judged by PEFT on linear modules of these names."""
    assert right(Made(SplitModel(SMALL), tmp_path, **lora))


def test_experts_without_a_delta_and_smaller_ranks_are_zero(tmp_path):
    lora = {"target_modules": ["gate_up_projs.0", "gate_up_projs.2"], "rank_pattern": {"gate_up_projs.0": 2}}
    Made(SplitModel(SMALL), tmp_path, **lora)
    delta = read(tmp_path)["model.layers.0.mlp.experts.w13"]
    assert delta.a.shape == (SMALL.experts, 4, SMALL.hidden)
    assert delta.b.shape == (SMALL.experts, 2 * SMALL.intermediate, 4)
    for empty in (delta.a[1], delta.b[1], delta.a[0, 2:], delta.b[0, :, 2:]):
        assert not empty.any()
    assert delta.a[2].all()


RENAMES: dict[str, Callable[[str], str]] = {
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled layers": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "sharded": lambda key: key.replace(".mlp", "._fsdp_wrapped_module.mlp"),
    "named": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_names_as_wrappers_write_them(rename, tmp_path):
    made = Made(fused_model(SMALL), tmp_path, **ALL)
    made.rewrite(lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    assert right(made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, tmp_path):
    """What the file holds, exactly: PEFT's merge of values that fit into `dtype`."""
    made = Made(fused_model(SMALL), tmp_path, **ALL)
    made.rewrite(lambda tensors: {key: tensor.to(torch.bfloat16).float() for key, tensor in tensors.items()})
    exact = read(tmp_path)
    made.rewrite(lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    for name, delta in read(tmp_path).items():
        assert torch.equal(delta.a, exact[name].a)
        assert torch.equal(delta.b, exact[name].b)


@pytest.mark.parametrize("lora", [ALL, PEFT_CASES["patterns"]], ids=["all", "patterns"])
def test_tensors_in_memory_are_read_as_files(lora, tmp_path):
    made = Made(fused_model(SMALL), tmp_path, **lora)
    found = list(deltas(AdapterConfig.from_dict(made.config, "memory"), made.tensors, SMALL))
    expected = read(tmp_path)
    assert [delta.name for delta in found] == list(expected)
    for delta in found:
        assert torch.equal(delta.a, expected[delta.name].a)
        assert torch.equal(delta.b, expected[delta.name].b)


def test_one_layer_is_read_alone(tmp_path):
    Made(fused_model(SMALL), tmp_path, **ALL)
    adapter = Adapter(tmp_path)
    assert adapter.layer(SMALL, 1).keys() == {name for name in read(tmp_path) if name.startswith("model.layers.1.")}
    assert adapter.layer(SMALL, 99) == {}


@pytest.mark.parametrize("model", [fused_model, SplitModel])
def test_description(model, tmp_path):
    """Norms against those of PEFT's merged weights, the rest against what was asked for."""
    lora = ALL if model is fused_model else SPLIT_CASES["unequal ranks and alphas"]
    made = Made(model(SMALL), tmp_path, **lora)
    about = Adapter(tmp_path).describe(SMALL)
    assert about["tensors"] == len(made.tensors)
    assert about["bytes"] == sum(tensor.nbytes for tensor in made.tensors.values())
    assert about["dtypes"] == ["float32"]
    changed = {name for name, before in made.before.items() if not torch.equal(before, made.after[name])}
    assert about["modules"].keys() == changed
    for name, module in about["modules"].items():
        norm = float((made.after[name] - made.before[name]).norm())
        assert module["frobenius_norm"] == pytest.approx(norm, rel=TOLERANCE)
        assert module["shape"] == list(made.before[name].shape[-2:])
    if model is SplitModel:
        assert about["largest_rank"] == 7
        assert about["modules"]["model.layers.1.mlp.experts.w13"]["ranks"] == [2, 4, 7]
        assert about["modules"]["model.layers.1.mlp.experts.w13"]["scales"] == [1 / 2, 6 / 7, 6 / 4]
    assert about["modules"]["model.layers.0.mlp.experts.w2"]["experts"] == SMALL.experts


def test_the_norm_of_what_nearly_cancels_is_not_lost():
    """In float32 the square of the first would be 0, and where a sum cancels it may be below 0."""
    a = torch.ones(2, 1)
    assert Delta("x", a, torch.tensor([[1.0, 2**-17 - 1]])).frobenius_norm() == 2**-17
    for row, column in zip(*torch.randn(2, 700, 3, generator=torch.Generator().manual_seed(72)), strict=True):
        nothing = Delta("x", torch.stack([row, -10 * row]), torch.stack([column, column / 10], 1))
        assert 0 <= nothing.frobenius_norm() < 1e-5


def test_weights_are_taken_from_the_models_as_they_are():
    """The makers' own view of a model: [out, in], of both models."""
    for model in (fused_model(SMALL), SplitModel(SMALL)):
        weights = weights_of(model)
        assert weights["model.layers.1.mlp.experts.w13"].shape == (SMALL.experts, 2 * SMALL.intermediate, SMALL.hidden)
        assert weights["model.layers.0.self_attn.o_proj"].shape == (SMALL.hidden, SMALL.q_rows)

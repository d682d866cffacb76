"""The proof of every published form that a source may have, also of those that the conversion does not read yet."""

import re
from collections.abc import Callable

import pytest
import torch
from proof_cases import all_tensors, proved, require_found, rewritten

from gptoss_nf4.proof.config import Asked

LAYOUTS = {
    "a flat router": lambda name: name.replace("router.linear.", "router."),
    "PEFT": lambda name: re.sub(r"(_proj(s\.\d+)?)\.", r"\1.base_layer.", f"base_model.model.{name}"),
    "torch.compile": lambda name: f"_orig_mod.{name}".replace("layers.", "layers._orig_mod."),
    "both, and data parallel": lambda name: f"module._orig_mod.base_model.model.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace("mlp.", "_fsdp_wrapped_module.mlp."),
    "Lightning": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("rename", LAYOUTS.values(), ids=LAYOUTS)
def test_published_names_are_known_whatever_was_wrapped_around_them(tiny, converted, tmp_path, rename):
    def change(tensors):
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors |= renamed

    source = rewritten(tiny, tmp_path / "source", change)
    assert proved(source, converted).source_tensors == len(all_tensors(tiny))


def test_two_tensors_of_one_name_are_found(tiny, converted, tmp_path):
    name = "model.norm.weight"
    source = rewritten(tiny, tmp_path / "source", lambda t: t.update({f"teacher.{name}": t[name].clone()}))
    require_found(source, converted, f"cannot compare: .*{name}")


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_may_be_stored_as_any_dtype(tiny, converted, tmp_path, storage):
    def change(tensors):
        codes = [name for name in tensors if f"{name}.absmax" in tensors]
        tensors |= {name: tensors[name].flatten().view(storage).view(-1, 1) for name in codes}

    assert proved(rewritten(tiny, tmp_path / "source", change), converted).total.different == 0


def test_a_quantized_router_and_head_are_compared_as_they_dequantize(tiny, converted, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stored = {
        "model.layers.0.mlp.router.linear.weight": "model.layers.0.mlp.router.weight",
        "lm_head.weight": "lm_head.weight",
    }
    dense = {}

    def quantize(tensors):
        for name, target in stored.items():
            tensors[name], state = quantize_4bit(tensors[name].float(), compress_statistics=True, quant_type="nf4")
            dense[target] = dequantize_4bit(tensors[name], state).half()
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    source = rewritten(tiny, tmp_path / "source", quantize)
    require_found(source, converted, "lm_head")
    result = rewritten(converted, tmp_path / "result", lambda t: t.update(dense))
    assert proved(source, result).kinds["router_weight"].difference.different == 0


def fused_experts(tensors: dict, make: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Give `tensors` transformers' fused experts: `make` gets a weight [experts, in, out], and its tensors by ending."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    for layer in range(2):
        for split, fused in (("gate_up_projs", "gate_up_proj"), ("down_projs", "down_proj")):
            weights, biases = [], []
            for expert in range(8):
                prefix = f"model.layers.{layer}.mlp.experts.{split}.{expert}."
                beside = [name for name in tensors if name.startswith(f"{prefix}weight.")]
                state = QuantState.from_dict({name: tensors.pop(name) for name in beside}, device="cpu")
                state.dtype = torch.float32
                weights.append(dequantize_4bit(tensors.pop(f"{prefix}weight"), state).T)
                biases.append(tensors.pop(f"{prefix}bias"))
            name = f"model.layers.{layer}.mlp.experts.{fused}"
            tensors[f"{name}_bias"] = torch.stack(biases)
            tensors |= {name + ending: tensor for ending, tensor in make(torch.stack(weights)).items()}


def test_fused_experts_are_compared_too(tiny, converted, tmp_path):
    """transformers' [experts, in, out], here with the values that the split source has."""
    source = rewritten(tiny, tmp_path / "source", lambda t: fused_experts(t, lambda weight: {"": weight.contiguous()}))
    assert proved(source, converted).total.different == 0
    swapped = rewritten(
        tiny, tmp_path / "swapped", lambda t: fused_experts(t, lambda weight: {"": weight.flip(0).contiguous()})
    )
    require_found(swapped, converted, r"w13\.weight: got \d+ of 122880 values .*gate_up_proj\[0\]")


def test_fused_4_bit_experts_are_compared_with_what_was_made_of_them(tiny, converted, tmp_path):
    """Blocks along the outputs, double quantization over all experts. bitsandbytes makes the result of it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made: dict[tuple, torch.Tensor] = {}

    def make(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        made[tuple(weight.shape), len(made)] = dequantize_4bit(codes, state).transpose(1, 2).contiguous()
        return {"": codes} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}

    source = rewritten(tiny, tmp_path / "source", lambda t: fused_experts(t, make))
    weights = iter(made.values())

    def change(tensors):
        for layer in range(2):
            for target in ("w13", "w2"):
                name = f"model.layers.{layer}.mlp.experts.{target}.weight"
                codes, state = quantize_4bit(next(weights), quant_type="nf4")
                tensors[name] = codes.view(tensors[name].shape)
                tensors[f"{name}.absmax"] = state.absmax.view(tensors[f"{name}.absmax"].shape)

    again = Asked("nf4", "interleaved", "nf4", 64, "float16", "auto")
    result = rewritten(
        converted, tmp_path / "result", change, lambda c: c["quantization_config"].update(requant_mode="nf4")
    )
    found = proved(source, result, again)
    assert found.kinds["w13_weight"].difference.different > 0
    assert found.kinds["w13_bias"].difference.different == 0
    reversed_ = rewritten(
        result,
        tmp_path / "reversed",
        lambda t: t.update({name: t[name].flip(0).contiguous() for name in t if "w2.weight" in name and t[name].dim() > 1}),
    )
    require_found(
        source, reversed_, r"w2\.weight: got \d+ of 192 rows that have nothing in common with .*down_proj\[0\]", again
    )

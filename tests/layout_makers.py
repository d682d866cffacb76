"""Checkpoints in every layout that is read, each written by the library that people have it from.

A maker is a function of a directory. It writes the weights there, and returns the experts of both layers as that library
reads them, float32, by transformers' names: `model.layers.0.mlp.experts.gate_up_proj` is [E, hidden, 2 * intermediate].
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, GptOssForCausalLM

from gptoss_nf4.samples import embedded

D = replace(embedded.TINY, experts=4, intermediate=128)
LAYER = "model.layers.{}."
Tensors = dict[str, torch.Tensor]


def model() -> GptOssForCausalLM:
    """transformers' gpt-oss in bfloat16 with random values everywhere, biases and sinks included."""
    config = GptOssConfig(**{k: v for k, v in embedded.model_config(D).items() if k != "quantization_config"})
    made = GptOssForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            std = 0.2 if parameter.dim() == 1 else 2.0 / math.sqrt(D.hidden)
            parameter.copy_(embedded.random_tensor(name, parameter.shape, std, mean))
    return made.eval()


def experts_of(tensors: Tensors) -> Tensors:
    return {n: t.float() for n, t in tensors.items() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}


def write_sides(directory: Path) -> None:
    """config.json, where the library has written none, and the tokenizer."""
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text(json.dumps(embedded.model_config(D)))
    embedded.write_tokenizer(directory)


def write(directory: Path, tensors: Tensors) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    write_sides(directory)


def fused_16_bit(directory: Path) -> Tensors:
    made = model()
    made.save_pretrained(directory)
    write_sides(directory)
    return experts_of(made.state_dict())


def mixture(directory: Path) -> Tensors:
    """What transformers 5 saves of a model that it loaded in 4 bit: only linear modules are quantized."""
    plain = directory.with_name("before-mixture")
    made = model()
    made.save_pretrained(plain)
    in_4_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=in_4_bit, device_map="cpu").save_pretrained(directory)
    write_sides(directory)
    return experts_of(made.state_dict())


def quantized(weight: torch.Tensor, name: str, nested: bool = True, storage=torch.uint8, **options) -> Tensors:
    """`name` and its sidecars, by bitsandbytes."""
    packed, state = bnb.quantize_4bit(
        weight.to(torch.bfloat16), compress_statistics=nested, quant_storage=storage, **{"quant_type": "nf4", **options}
    )
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def read(tensors: Tensors, name: str) -> torch.Tensor:
    """The weight `name` as bitsandbytes reads it, float32. from_dict empties what it gets, so it gets a copy."""
    sidecars = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if not any("quant_state" in key for key in sidecars):
        return tensors[name].float()
    state = bnb.QuantState.from_dict(sidecars, device=torch.device("cpu"))
    # As one row: bitsandbytes' CPU kernel begins a block with each row, which its quantizer does not.
    shape, state.shape, state.dtype = state.shape, torch.Size([1, state.shape.numel()]), torch.float32
    return bnb.dequantize_4bit(tensors[name], state).reshape(shape)


def fused_4_bit(directory: Path, attention: bool = True, **options) -> Tensors:
    """Experts in 4 bit by bitsandbytes' own parametrization, as axolotl and newer Unsloth have them."""
    made = model()
    for layer in made.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, **{"quant_type": "nf4", **options})
    tensors = dict(made.state_dict())
    if attention:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors |= quantized(tensors[name], name)
    write(directory, tensors)
    names = [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    return {name: read(tensors, name) for name in names}


def fused_nested_4_bit(directory: Path) -> Tensors:
    return fused_4_bit(directory, compress_statistics=True)


def fused_fp4_and_attention_in_16_bit(directory: Path) -> Tensors:
    return fused_4_bit(directory, attention=False, compress_statistics=True, quant_type="fp4", blocksize=64)


def fused_stored_as(dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[Path], Tensors]:
    """Codes of the experts in another dtype and shape, as bnb_4bit_quant_storage and FSDP leave them."""

    def make(directory: Path) -> Tensors:
        experts = fused_nested_4_bit(directory)
        tensors = load_file(directory / "model.safetensors")
        write(directory, tensors | {name: tensors[name].flatten().view(dtype).reshape(shape) for name in experts})
        return experts

    return make


def fused_and_split(directory: Path) -> Tensors:
    """Layer 0 has a fused w13 and a split w2, layer 1 the other way round."""
    parts: list[tuple[Tensors, Tensors]] = []
    for make in (fused_nested_4_bit, split):
        own = directory.with_name(f"before-{make.__name__}")
        parts.append((make(own), load_file(own / "model.safetensors")))
    (fused_experts, tensors), (split_experts, others) = parts
    experts = dict(fused_experts)
    for stack in (f"{LAYER.format(0)}mlp.experts.down_proj", f"{LAYER.format(1)}mlp.experts.gate_up_proj"):
        tensors = {name: value for name, value in tensors.items() if not name.startswith(stack)}
        tensors |= {name: value for name, value in others.items() if name.startswith(f"{stack}s.")}
        experts[stack] = split_experts[stack]
    write(directory, tensors)
    return experts


def fused_with_blocks_across_rows(directory: Path) -> Tensors:
    return fused_4_bit(directory, attention=False, quant_type="fp4", blocksize=128)  # w2 has 192 outputs


def split(directory: Path, quantize=quantized, dense=lambda name: False, also=(), rename=lambda name: name) -> Tensors:
    """Experts as weights of their own. `also` are further tensors in 4 bit; `rename` is applied to every name at last."""
    tensors: Tensors = {}
    for name, value in model().state_dict().items():
        stem, _, kind = name.rpartition(".experts.")
        if not stem:
            tensors[name] = value
            continue
        kind, bias = kind.removesuffix("_bias"), kind.endswith("_bias")
        for expert, each in enumerate(value):
            own = f"{stem}.experts.{kind}s.{expert}.{'bias' if bias else 'weight'}"
            tensors[own] = each.clone() if bias else each.T.contiguous()
    for name in [n for n in tensors if "_proj" in n and n.endswith(".weight") and not dense(n)] + list(also):
        tensors |= quantize(tensors[name], name)
    write(directory, {rename(name): value for name, value in tensors.items()})
    fused: Tensors = {}
    for layer in range(D.layers):
        for kind in ("gate_up", "down"):
            stem = f"{LAYER.format(layer)}mlp.experts.{kind}_proj"
            fused[stem] = torch.stack([read(tensors, f"{stem}s.{e}.weight").T for e in range(D.experts)])
    return fused


def stored_as(dtype: torch.dtype) -> Callable[[Path], Tensors]:
    return lambda directory: split(directory, lambda weight, name: quantized(weight, name, storage=dtype))


def split_16_bit(directory: Path) -> Tensors:
    return split(directory, dense=lambda name: True)


def single_level(directory: Path) -> Tensors:
    return split(directory, lambda weight, name: quantized(weight, name, nested=False))


def split_fp4(directory: Path) -> Tensors:
    return split(directory, lambda weight, name: quantized(weight, name, quant_type="fp4"))


ALSO = [
    *(f"{LAYER.format(layer)}mlp.router.weight" for layer in range(D.layers)),
    "lm_head.weight",
    "model.embed_tokens.weight",
]


def router_head_and_embeddings_in_4_bit(directory: Path) -> Tensors:
    return split(directory, also=ALSO)


def wrapped(name: str) -> str:
    """As PEFT, torch.compile and FSDP together leave it; of the linear modules of attention, PEFT has wrapped q and v."""
    for module in ("q_proj", "v_proj"):
        name = name.replace(f"self_attn.{module}.", f"self_attn.{module}.base_layer.")
    name = name.replace("mlp.experts.", "_fsdp_wrapped_module.mlp.experts.")
    return f"_orig_mod.base_model.model.{name}"


def wrapped_names(directory: Path) -> Tensors:
    return split(directory, rename=wrapped)


EXACT = {
    "flat router": split,
    "stored as bfloat16": stored_as(torch.bfloat16),
    "stored as float16": stored_as(torch.float16),
    "stored as float32": stored_as(torch.float32),
    "single level": single_level,
    "fp4": split_fp4,
    "router, head and embeddings in 4 bit": router_head_and_embeddings_in_4_bit,
    "wrapped names": wrapped_names,
    "fused, 4 bit": fused_4_bit,
    "fused, 4 bit, nested": fused_nested_4_bit,
    "fused, fp4, attention in 16 bit": fused_fp4_and_attention_in_16_bit,
    "fused, stored as bfloat16": fused_stored_as(torch.bfloat16, (-1, 1)),
    "fused, stored as float16 of each expert": fused_stored_as(torch.float16, (D.experts, -1)),
    "fused, stored as float32 in rows": fused_stored_as(torch.float32, (D.experts, 2, -1)),
    "fused, stored as int8": fused_stored_as(torch.int8, (-1,)),
    "partly fused": fused_and_split,
}
REQUANTIZED = {
    "split, 16 bit": split_16_bit,
    "fused, 16 bit": fused_16_bit,
    "mixture of transformers 5": mixture,
    "fused, blocks that cross rows": fused_with_blocks_across_rows,
}

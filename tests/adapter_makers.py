"""Small gpt-oss models and adapters on them, made by PEFT; PEFT's own merge says what an adapter means.

Forms that this version of PEFT does not write are made from those it does, tensor by tensor, with a loop for every index.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from gptoss_nf4.format.dimensions import Dimensions

Tensors = dict[str, torch.Tensor]

# No two sizes of a layer are equal, so that nothing fits by chance.
SMALL = Dimensions(
    layers=2,
    hidden=24,
    intermediate=20,
    experts=3,
    experts_per_token=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocabulary=50,
)
# As gpt-oss itself: down_proj is square.
SQUARE = Dimensions(**SMALL.as_dict() | {"intermediate": SMALL.hidden})

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = ["mlp.router.weight"]
PREFIX = "base_model.model.model.layers."


def fused_model(d: Dimensions) -> GptOssForCausalLM:
    """transformers' own gpt-oss in float32, with weights so large that every delta shows in the logits."""
    torch.manual_seed(1)
    config = GptOssConfig(
        num_hidden_layers=d.layers,
        hidden_size=d.hidden,
        intermediate_size=d.intermediate,
        num_local_experts=d.experts,
        num_experts_per_tok=d.experts_per_token,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim,
        vocab_size=d.vocabulary,
        sliding_window=8,
        attn_implementation="eager",
        pad_token_id=0,
    )
    model = GptOssForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


class SplitModel(nn.Module):
    """The modules of Unsloth's 4-bit gpt-oss that take an adapter, by name, as linear ones; it does not run."""

    def __init__(self, d: Dimensions):
        super().__init__()
        torch.manual_seed(2)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(d.layers):
            layer = nn.Module()
            layer.self_attn = nn.Module()
            for name, (columns, rows) in {
                "q_proj": (d.hidden, d.q_rows),
                "k_proj": (d.hidden, d.kv_rows),
                "v_proj": (d.hidden, d.kv_rows),
                "o_proj": (d.q_rows, d.hidden),
            }.items():
                setattr(layer.self_attn, name, nn.Linear(columns, rows))
            layer.mlp = nn.Module()
            layer.mlp.router = nn.Module()
            layer.mlp.router.linear = nn.Linear(d.hidden, d.experts)
            layer.mlp.experts = nn.Module()
            layer.mlp.experts.gate_up_projs = nn.ModuleList(
                nn.Linear(d.hidden, 2 * d.intermediate) for _ in range(d.experts)
            )
            layer.mlp.experts.down_projs = nn.ModuleList(nn.Linear(d.intermediate, d.hidden) for _ in range(d.experts))
            self.model.layers.append(layer)


def weights_of(model: nn.Module) -> Tensors:
    """The dense weights that an adapter may change: [out, in], of experts [E, out, in], as our targets are called."""
    found = {}
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        for name in ATTENTION:
            found[f"{prefix}self_attn.{name}"] = getattr(layer.self_attn, name).weight
        router, experts = layer.mlp.router, layer.mlp.experts
        if isinstance(model, SplitModel):
            found[f"{prefix}mlp.router"] = router.linear.weight
            found[f"{prefix}mlp.experts.w13"] = torch.stack([one.weight for one in experts.gate_up_projs])
            found[f"{prefix}mlp.experts.w2"] = torch.stack([one.weight for one in experts.down_projs])
        else:  # transformers stores experts as [E, in, out]
            found[f"{prefix}mlp.router"] = router.weight
            found[f"{prefix}mlp.experts.w13"] = experts.gate_up_proj.transpose(1, 2)
            found[f"{prefix}mlp.experts.w2"] = experts.down_proj.transpose(1, 2)
    return {name: weight.detach().clone() for name, weight in found.items()}


def with_adapter(model: nn.Module, **lora) -> PeftModel:
    """`model` with a LoRA adapter of PEFT's on it, A and B random; `lora` are fields of LoraConfig."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": []} | lora)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return peft_model


class Made:
    """An adapter on disk, and the base's weights without and with it, as PEFT merges it."""

    def __init__(self, model: nn.Module, directory: Path, **lora):
        self.directory = directory
        self.before = weights_of(model)
        peft_model = with_adapter(model, **lora)
        peft_model.save_pretrained(directory)
        self.after = weights_of(peft_model.merge_and_unload())

    @property
    def config(self) -> dict:
        return json.loads((self.directory / "adapter_config.json").read_text())

    @property
    def tensors(self) -> Tensors:
        return load_file(self.directory / "adapter_model.safetensors")

    def rewrite(self, change: Callable[[Tensors], Tensors | None] | None = None, **fields) -> None:
        """Save what `change` makes of the tensors, and `fields` in the configuration (None takes a field away)."""
        tensors = self.tensors
        if change:
            tensors = change(tensors) or tensors
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, self.weights_file)
        config = {name: value for name, value in (self.config | fields).items() if fields.get(name, 0) is not None}
        (self.directory / "adapter_config.json").write_text(json.dumps(config))

    @property
    def weights_file(self) -> Path:
        return self.directory / "adapter_model.safetensors"


def make_swapped(model: GptOssForCausalLM) -> GptOssForCausalLM:
    """`model` as transformers 4.57 had it: its experts do not say that their weights are [E, in, out]."""
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = False
    return model


def grouped(tensors: Tensors, experts: int) -> Tensors:
    """Fused experts with the columns of lora_B as Unsloth had them until 2026.9.5: those of an expert together."""
    result = dict(tensors)
    for key, old in tensors.items():
        if "mlp.experts" in key and "lora_B" in key:
            rank = old.shape[1] // experts
            new = torch.empty_like(old)
            for e in range(experts):
                for j in range(rank):
                    new[:, e * rank + j] = old[:, j * experts + e]
            result[key] = new
    return result


def swapped(tensors: Tensors, experts: int) -> Tensors:
    """Fused experts the other way round, in PEFT's column order: lora_A becomes lora_B and lora_B becomes lora_A."""
    result = dict(tensors)
    for key in tensors:
        if "mlp.experts" not in key or "lora_A" not in key:
            continue
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        rank = a.shape[0] // experts
        new_a, new_b = torch.empty(experts * rank, b.shape[0]), torch.empty(a.shape[1], experts * rank)
        for e in range(experts):
            for j in range(rank):
                new_a[e * rank + j] = b[:, j * experts + e]
                new_b[:, j * experts + e] = a[e * rank + j]
        result[key], result[key.replace("lora_A", "lora_B")] = new_a, new_b
    return result


def split(tensors: Tensors, experts: int) -> Tensors:
    """Both fused parameters as Unsloth's modules for each expert."""
    result = {}
    for key, tensor in tensors.items():
        if "mlp.experts" not in key:
            result[key] = tensor
            continue
        name = "mlp.experts.gate_up_projs" if "base_layer" in key else "mlp.experts.down_projs"
        old_name = "mlp.experts.base_layer" if "base_layer" in key else "mlp.experts"
        for e in range(experts):
            new_key = key.replace(old_name, f"{name}.{e}")
            if "lora_A" in key:
                rank = tensor.shape[0] // experts
                result[new_key] = torch.stack([tensor[e * rank + j] for j in range(rank)])
            else:
                rank = tensor.shape[1] // experts
                result[new_key] = torch.stack([tensor[:, j * experts + e] for j in range(rank)], dim=1)
    return result

"""Writing an adapter in the form that PEFT loads on transformers' gpt-oss: for references, not for serving.

Every module is padded with zeros to the largest rank, and has scale 1. So r and lora_alpha are the same for all. PEFT
keeps lora_A of experts as [E * r, in] and lora_B as [out, r * E]. Rank j of expert e is row e * r + j of lora_A and column
j * E + e of lora_B.
"""

from pathlib import Path

import torch
from torch.nn.functional import pad

from gptoss_nf4.adapters.adapter import WEIGHTS_FILE, Adapter
from gptoss_nf4.adapters.canonical import Delta
from gptoss_nf4.adapters.config import CONFIG_FILE
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.storage.writing import write_file, write_json

PREFIX = "base_model.model."
# Last part of a target's name -> its name in target_parameters. Other targets go into target_modules.
PARAMETERS = {"w13": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj", "router": "mlp.router.weight"}
# Where PEFT keeps lora_A and lora_B of an experts' parameter: it wraps the module twice, w2 outside.
KEYS = {"w13": "experts.base_layer", "w2": "experts"}


def write_peft_form(adapter: Adapter, d: Dimensions, directory: Path) -> None:
    """Write `adapter` into `directory`, in float32. `d` are the base's dimensions."""
    from safetensors.torch import save_file

    deltas = {name: delta for _, layer in adapter.layers(d) for name, delta in layer.items()}
    rank = max(delta.a.shape[-2] for delta in deltas.values())
    parts = {name.rpartition(".")[2] for name in deltas}
    if parts & KEYS.keys():  # PEFT tells the two apart by both being there
        parts |= KEYS.keys()
        deltas = _with_both(deltas, d)
    tensors: dict[str, torch.Tensor] = {}
    for name, delta in deltas.items():
        stem, _, part = name.rpartition(".")
        key = f"{PREFIX}{stem.removesuffix('.experts')}.{KEYS.get(part, part)}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = _stored(delta, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(parts - PARAMETERS.keys()),
        "target_parameters": [parameter for part, parameter in PARAMETERS.items() if part in parts],
        "inference_mode": True,
    }
    write_json(directory / CONFIG_FILE, config)
    write_file(directory / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def _with_both(deltas: dict[str, Delta], d: Dimensions) -> dict[str, Delta]:
    """`deltas`, with deltas of zeros for every w13 and w2 that has none."""
    found = dict(deltas)
    shapes = {"w13": (2 * d.intermediate, d.hidden), "w2": (d.hidden, d.intermediate)}
    for layer in range(d.layers):
        for part, (rows, columns) in shapes.items():
            name = f"model.layers.{layer}.mlp.experts.{part}"
            if name not in found:
                a, b = torch.zeros(d.experts, 1, columns), torch.zeros(d.experts, rows, 1)
                found[name] = Delta(name, a, b)
    return found


def _stored(delta: Delta, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B, padded to `rank`, as PEFT stores them."""
    missing = rank - delta.a.shape[-2]
    a, b = pad(delta.a, (0, 0, 0, missing)), pad(delta.b, (0, missing))
    if a.ndim == 3:
        a = a.reshape(-1, a.shape[-1])
        b = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return a.contiguous(), b.contiguous()

"""Writing one layer of an adapter in the form that PEFT loads on transformers' gpt-oss: for references, not for serving.

The model that it is for has that layer alone. Every module is padded with zeros to the largest rank, and has scale 1. So r
and lora_alpha are the same for all. PEFT keeps lora_A of experts as [E * r, in] and lora_B as [out, r * E]. Rank j of
expert e is row e * r + j of lora_A and column j * E + e of lora_B.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.functional import pad

from gptoss_nf4.adapters.adapter import WEIGHTS_FILE
from gptoss_nf4.adapters.canonical import Delta
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.storage.checkpoint import ADAPTER_CONFIG
from gptoss_nf4.storage.writing import write_bytes, write_json

PREFIX = "base_model.model.model.layers.0."
# Last part of a target's name -> its name in target_parameters. Other targets go into target_modules.
PARAMETERS = {"w13": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj", "router": "mlp.router.weight"}
# Where PEFT keeps lora_A and lora_B of these. It wraps the experts' module once for each of their two, w2 outside.
KEYS = {"w13": "mlp.experts.base_layer", "w2": "mlp.experts", "router": "mlp.router"}


def write_peft_form(deltas: Mapping[str, Delta], d: Dimensions, directory: Path) -> None:
    """Write `deltas`, those of one layer by full name, into `directory`, in float32. `d` are the base's dimensions."""
    from safetensors.torch import save

    by_part = {name.rpartition(".")[2]: delta for name, delta in deltas.items()}
    rank = max(delta.a.shape[-2] for delta in by_part.values())
    if "w13" in by_part or "w2" in by_part:  # PEFT tells the two apart by both being there
        by_part = _zeros(d) | by_part
    tensors: dict[str, torch.Tensor] = {}
    for part, delta in by_part.items():
        key = PREFIX + KEYS.get(part, f"self_attn.{part}")
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = _stored(delta, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(by_part.keys() - PARAMETERS.keys()),
        "target_parameters": [parameter for part, parameter in PARAMETERS.items() if part in by_part],
        "inference_mode": True,
    }
    write_json(directory / ADAPTER_CONFIG, config)
    write_bytes(directory / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))


def _zeros(d: Dimensions) -> dict[str, Delta]:
    """Deltas of zeros for w13 and w2."""
    shapes = {"w13": (2 * d.intermediate, d.hidden), "w2": (d.hidden, d.intermediate)}
    return {
        part: Delta(part, torch.zeros(d.experts, 1, columns), torch.zeros(d.experts, rows, 1))
        for part, (rows, columns) in shapes.items()
    }


def _stored(delta: Delta, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B, padded to `rank`, as PEFT stores them."""
    missing = rank - delta.a.shape[-2]
    a, b = pad(delta.a, (0, 0, 0, missing)), pad(delta.b, (0, missing))
    if a.ndim == 3:
        a = a.reshape(-1, a.shape[-1])
        b = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return a.contiguous(), b.contiguous()

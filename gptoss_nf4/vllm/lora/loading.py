"""Loading an adapter for vLLM: from the files that Unsloth or PEFT wrote to the factors that vLLM's stacks hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.canonical import Delta
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.residual import writes_to_stream

EXPERTS = ".mlp.experts."
Factor: TypeAlias = torch.Tensor | list[torch.Tensor]


class AdapterLoader:
    """Stands where vLLM has its `LoRAModel` class, of which it asks `from_local_checkpoint` alone.

    vLLM's own loader refuses Unsloth's keys, casts before anything can be scaled, and accepts in silence what nothing
    applies. This one reads the files itself, and refuses in one line what does not fit the base. `merged` is what
    config.json says of an adapter that is merged into the base, None where none is.
    """

    def __init__(
        self, manager: LoRAModelManager, dimensions: Dimensions, residual_scale: float, merged: Mapping | None = None
    ):
        self.manager = manager
        self.dimensions = dimensions
        self.residual_scale = residual_scale
        self.merged = merged

    def from_local_checkpoint(
        self,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: object,
        *,
        lora_model_id: int,
        dtype: torch.dtype,
        **_: object,
    ) -> LoRAModel:
        """The adapter in `lora_dir` with factors in `dtype`; of experts, those of this rank."""
        adapter = Adapter(Path(lora_dir))
        self._require_unmerged(adapter)
        loras: dict[str, LoRALayerWeights] = {}
        rank = 0
        for layer, deltas in adapter.layers(self.dimensions):
            experts = {name: delta for name, delta in deltas.items() if EXPERTS in name}
            for name, delta in deltas.items():
                self._require_rank(delta, lora_dir)
                rank = max(rank, delta.a.shape[-2])
                if name not in experts:
                    module = name.replace(".self_attn.", ".attn.")  # vLLM's name of it
                    loras[module] = _weights(module, *self._factors(delta, dtype))
            module = f"model.layers.{layer}.mlp.experts"
            if experts and module in self.manager.modules:  # else another pipeline stage's
                loras[module] = self._experts(module, experts, dtype)
        return LoRAModel(lora_model_id, rank, loras)

    def _factors(self, delta: Delta, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A and lora_B in `dtype`. What o_proj adds goes into the scaled stream: lora_A, the larger one, takes it."""
        scale = self.residual_scale if writes_to_stream(f"{delta.name}.weight") else 1.0
        return (delta.a * scale).to(dtype), delta.b.to(dtype)

    def _experts(self, module: str, deltas: dict[str, Delta], dtype: torch.dtype) -> LoRALayerWeights:
        """Lists of w13's and w2's factors, [E, r, in] and [E, out, r], as vLLM's fused experts take them.

        A projection that the adapter leaves alone gets zeros of rank 1. w2 is scaled where it is applied.
        """
        d = self.dimensions
        shapes = {"w13": (2 * d.intermediate, d.hidden), "w2": (d.hidden, d.intermediate)}
        expert_map = self.manager.modules[module].base_layer.routed_experts.expert_map
        here = _global_numbers(expert_map, d.experts)
        lora_a, lora_b = [], []
        for kind, (rows, columns) in shapes.items():
            delta = deltas.get(f"{module}.{kind}")
            a = torch.zeros(d.experts, 1, columns) if delta is None else delta.a
            b = torch.zeros(d.experts, rows, 1) if delta is None else delta.b
            lora_a.append(a[here].to(dtype))
            lora_b.append(b[here].to(dtype))
        return _weights(module, lora_a, lora_b)

    def _require_unmerged(self, adapter: Adapter) -> None:
        if self.merged is not None and adapter.sha256() == self.merged["sha256"]:
            raise UserError(
                "adapter is merged already",
                where=adapter.directory,
                got=f"the adapter {self.merged['name']}, which is in the weights of this checkpoint",
                expected="another adapter: this one would be applied twice",
                next_step="ask for the model without it, or serve the unmerged checkpoint with it",
            )

    def _require_rank(self, delta: Delta, lora_dir: str) -> None:
        allowed = self.manager.lora_config.max_lora_rank
        if delta.a.shape[-2] > allowed:
            raise UserError(
                "rank too large",
                where=lora_dir,
                got=f"rank {delta.a.shape[-2]} in {delta.name}",
                expected=f"at most {allowed}",
                next_step="start vLLM with a larger --max-lora-rank",
            )


def _weights(module: str, lora_a: Factor, lora_b: Factor) -> LoRALayerWeights:
    """`scaling` is 1: the scale is in lora_B already."""
    return LoRALayerWeights(module, rank=1, lora_alpha=1, lora_a=lora_a, lora_b=lora_b, scaling=1)


def _global_numbers(expert_map: torch.Tensor | None, experts: int) -> torch.Tensor:
    """Global numbers of this rank's experts, in the order of their local ones."""
    if expert_map is None:
        return torch.arange(experts)
    expert_map = expert_map.cpu()
    here = (expert_map >= 0).nonzero().flatten()
    return here[expert_map[here].argsort()]

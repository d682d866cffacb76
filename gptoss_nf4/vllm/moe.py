"""NF4 experts in vLLM, with expert bias and gpt-oss's clamped SwiGLU."""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig, biased_moe_quant_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.rows import INTERLEAVED, interleaved_rows
from gptoss_nf4.vllm import ops  # noqa: F401  (registers torch.ops.gptoss_nf4)
from gptoss_nf4.vllm.dequantize import dequantize
from gptoss_nf4.vllm.experts import used_experts  # noqa: F401  (registers torch.ops.gptoss_nf4)
from gptoss_nf4.vllm.kernels.tiles import gate_and_up_tiles, pack_absmax, pack_codes, padded_rows, tile_inputs
from gptoss_nf4.vllm.loading import (
    blocksize_of_shard,
    register_parameter,
    repeat_absmax,
    require_filled,
    require_packable,
    runs_on_kernels,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from gptoss_nf4.vllm.config import GptOssNf4Config


class Nf4MoEMethod(FusedMoEMethodBase):
    """w13 and w2 as codes and absmax of this rank's experts; gate and up rows interleaved in memory."""

    def __init__(self, config: "GptOssNf4Config", moe: FusedMoEConfig, prefix: str):
        super().__init__(moe)
        self.config = config
        self.prefix = prefix
        if moe.activation != MoEActivation.SWIGLUOAI or not moe.has_bias:
            raise UserError(
                "unsupported experts",
                where=prefix,
                got=f"activation {moe.activation}, bias {moe.has_bias}",
                expected="gpt-oss's swigluoai with bias",
                next_step="use a vLLM version that the plugin was tested with",
            )

    def create_weights(
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Register codes uint8 [E, rows, in / 2], absmax float32 [E, rows, in / blocksize], bias [E, rows] for both."""
        shapes = {
            "w13": (2 * intermediate_size_per_partition, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        layer.nf4_blocksizes = {}
        layer.nf4_packed = self.packs(params_dtype)
        for name, (rows, columns) in shapes.items():
            blocksize = blocksize_of_shard(self.config.blocksize, columns, self.prefix)
            layer.nf4_blocksizes[name] = blocksize
            parameters = {
                "codes": torch.empty(num_experts, rows, columns // 2, dtype=torch.uint8, device="meta"),
                "absmax": torch.empty(num_experts, rows, columns // blocksize, dtype=torch.float32, device="meta"),
                "expert_bias": torch.empty(num_experts, rows, dtype=params_dtype, device="meta"),
            }
            for kind, stored in parameters.items():
                load = self._loader(layer, name, kind, stored.shape)
                kept = self._arranged(layer, name, kind, stored)
                register_parameter(layer, self.prefix, f"{name}_{kind}", kept.shape, kept.dtype, load)

    def packs(self, params_dtype: torch.dtype) -> bool:
        """Whether the weights are kept in the kernels' order."""
        return runs_on_kernels(params_dtype)

    def _arranged(self, layer: "RoutedExperts", name: str, kind: str, rows: torch.Tensor) -> torch.Tensor:
        """[E, rows, ...] as stored -> as kept on the device."""
        if not layer.nf4_packed:
            return rows
        if name == "w13":
            rows = gate_and_up_tiles(rows, 1)
        if kind == "codes":
            return pack_codes(rows, tile_inputs(layer.nf4_blocksizes[name]))
        return pack_absmax(rows) if kind == "absmax" else pad(rows, (0, padded_rows(rows.shape[1]) - rows.shape[1]))

    def _loader(self, layer: "RoutedExperts", name: str, kind: str, shape: torch.Size):
        """How the tensor of all experts becomes this rank's parameter; `shape` is that of its rows before packing."""

        def load(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
            if kind == "absmax":
                if layer.nf4_packed:
                    require_packable(tensor, f"{self.prefix}.{name}_absmax")
                tensor = repeat_absmax(tensor, self.config.blocksize, layer.nf4_blocksizes[name])
            local = self._local_experts(layer, tensor)
            if name == "w13" and self.config.w13_order != INTERLEAVED:
                local = local[:, torch.from_numpy(interleaved_rows(self.config.w13_order, local.shape[1]))]
            local = self._rank_slice(local, shape, name, kind)
            if local.shape != shape:
                raise UserError(
                    "wrong shape",
                    where=f"{self.prefix}.{name}_{kind}",
                    got=list(local.shape),
                    expected=list(shape),
                    next_step="convert the checkpoint again",
                )
            for expert in range(len(local)):  # one at a time: packing takes some copies, on the device
                rows = local[expert : expert + 1].to(parameter.device)
                parameter.data[expert].copy_(self._arranged(layer, name, kind, rows)[0])

        return load

    def _local_experts(self, layer: "RoutedExperts", tensor: torch.Tensor) -> torch.Tensor:
        """The experts of this rank, in the order of their local numbers (all of them without expert parallelism)."""
        if layer.expert_map is None:
            return tensor
        expert_map = layer.expert_map.cpu()
        here = (expert_map >= 0).nonzero().flatten()
        return tensor[here[expert_map[here].argsort()]]

    def _rank_slice(self, tensor: torch.Tensor, shape: torch.Size, name: str, kind: str) -> torch.Tensor:
        """Tensor parallelism: w13 by rows, w2 by input columns; w2's bias is added on the first rank only."""
        parallel = self.moe.moe_parallel_config
        if parallel.tp_size == 1:
            return tensor
        if name == "w2" and kind == "expert_bias":
            return tensor if parallel.tp_rank == 0 else torch.zeros_like(tensor)
        dim = 1 if name == "w13" else 2
        size = shape[dim]
        return tensor.narrow(dim, parallel.tp_rank * size, size)

    def process_weights_after_loading(self, layer: "RoutedExperts") -> None:
        require_filled(layer)

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> FusedMoEQuantConfig:
        return biased_moe_quant_config(layer.w13_expert_bias, layer.w2_expert_bias)

    def apply(
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts=None,
        shared_experts_input=None,
    ) -> torch.Tensor:
        """x [tokens, hidden], topk_* [tokens, k] with global expert numbers -> [tokens, hidden].

        On the CPU only the experts in use are dequantized. In float32 on a GPU all are: correct, and as slow as moving
        them, since asking which are in use would stall it and break CUDA graphs.
        """
        weights = {
            name: (getattr(layer, f"{name}_codes"), getattr(layer, f"{name}_absmax")) for name in layer.nf4_blocksizes
        }
        if layer.nf4_packed:
            return torch.ops.gptoss_nf4.packed_experts(
                x,
                topk_weights,
                topk_ids,
                layer.expert_map,
                layer.global_num_experts,
                *weights["w13"],
                layer.w13_expert_bias,
                layer.nf4_blocksizes["w13"],
                *weights["w2"],
                layer.w2_expert_bias,
                layer.nf4_blocksizes["w2"],
                self.config.quant_type,
            )
        if x.device.type == "cpu":
            return torch.ops.gptoss_nf4.used_experts(
                x,
                topk_weights,
                topk_ids,
                layer.expert_map,
                *weights["w13"],
                layer.w13_expert_bias,
                layer.nf4_blocksizes["w13"],
                *weights["w2"],
                layer.w2_expert_bias,
                layer.nf4_blocksizes["w2"],
                self.config.quant_type,
            )
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        w13, w2 = (
            dequantize(*weights[name], layer.nf4_blocksizes[name], self.config.quant_type, x.dtype)
            for name in ("w13", "w2")
        )
        return fused_experts(
            x,
            w13,
            w2,
            topk_weights,
            topk_ids,
            activation=MoEActivation.SWIGLUOAI,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            quant_config=self.get_fused_moe_quant_config(layer),
        )

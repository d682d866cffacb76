"""NF4 experts in vLLM, with expert bias and gpt-oss's clamped SwiGLU."""

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig, biased_moe_quant_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from gptoss_nf4.errors import UserError
from gptoss_nf4.fuse import INTERLEAVED, interleaved_rows
from gptoss_nf4.vllm.dequantize import dequantize
from gptoss_nf4.vllm.experts import used_experts  # noqa: F401  (registers torch.ops.gptoss_nf4)
from gptoss_nf4.vllm.loading import blocksize_of_shard, register_parameter, repeat_absmax, require_filled

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
                "unsupported experts", where=prefix, got=f"activation {moe.activation}, bias {moe.has_bias}",
                expected="gpt-oss's swigluoai with bias", next_step="use a vLLM version that the plugin was tested with",
            )  # fmt: skip

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
        for name, (rows, columns) in shapes.items():
            blocksize = blocksize_of_shard(self.config.blocksize, columns, self.prefix)
            layer.nf4_blocksizes[name] = blocksize
            parameters = {
                "codes": ((num_experts, rows, columns // 2), torch.uint8),
                "absmax": ((num_experts, rows, columns // blocksize), torch.float32),
                "expert_bias": ((num_experts, rows), params_dtype),
            }
            for kind, (shape, dtype) in parameters.items():
                load = self._loader(layer, name, kind)
                register_parameter(layer, self.prefix, f"{name}_{kind}", shape, dtype, load)

    def _loader(self, layer: "RoutedExperts", name: str, kind: str):
        """How the tensor of all experts becomes this rank's parameter."""

        def load(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
            if kind == "absmax":
                tensor = repeat_absmax(tensor, self.config.blocksize, layer.nf4_blocksizes[name])
            local = self._local_experts(layer, tensor)
            if name == "w13" and self.config.w13_order != INTERLEAVED:
                local = local[:, torch.from_numpy(interleaved_rows(self.config.w13_order, local.shape[1]))]
            local = self._rank_slice(local, parameter, name, kind)
            if local.shape != parameter.shape:
                raise UserError(
                    "wrong shape", where=f"{self.prefix}.{name}_{kind}", got=list(local.shape),
                    expected=list(parameter.shape), next_step="convert the checkpoint again",
                )  # fmt: skip
            parameter.data.copy_(local)

        return load

    def _local_experts(self, layer: "RoutedExperts", tensor: torch.Tensor) -> torch.Tensor:
        """The experts of this rank, in the order of their local numbers (all of them without expert parallelism)."""
        if layer.expert_map is None:
            return tensor
        expert_map = layer.expert_map.cpu()
        here = (expert_map >= 0).nonzero().flatten()
        return tensor[here[expert_map[here].argsort()]]

    def _rank_slice(self, tensor: torch.Tensor, parameter: torch.nn.Parameter, name: str, kind: str) -> torch.Tensor:
        """Tensor parallelism: w13 by rows, w2 by input columns; w2's bias is added on the first rank only."""
        parallel = self.moe.moe_parallel_config
        if parallel.tp_size == 1:
            return tensor
        if name == "w2" and kind == "expert_bias":
            return tensor if parallel.tp_rank == 0 else torch.zeros_like(tensor)
        dim = 1 if name == "w13" else 2
        size = parameter.shape[dim]
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

        On the CPU only the experts in use are dequantized. Asking a GPU which those are would stall it and break
        CUDA graphs, so there all are: correct, and as slow as moving them; the fast path takes this method's place.
        """
        weights = {
            name: (getattr(layer, f"{name}_codes"), getattr(layer, f"{name}_absmax")) for name in layer.nf4_blocksizes
        }
        if x.device.type == "cpu":
            return torch.ops.gptoss_nf4.used_experts(
                x, topk_weights, topk_ids, layer.expert_map,
                *weights["w13"], layer.w13_expert_bias, layer.nf4_blocksizes["w13"],
                *weights["w2"], layer.w2_expert_bias, layer.nf4_blocksizes["w2"],
                self.config.quant_type,
            )  # fmt: skip
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

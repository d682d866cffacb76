"""The experts with each token's adapter, in the place where vLLM looks for a kernel that knows LoRA."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from gptoss_nf4.vllm import experts, ops  # noqa: F401  (register torch.ops.gptoss_nf4)


def kernel_with_lora(
    moe: FusedMoEConfig, quant_config: FusedMoEQuantConfig, weights: dict, residual_scale: float, packed: bool
) -> mk.FusedMoEKernel:
    """What vLLM wraps in its LoRA layer: nothing to prepare, our experts, nothing to finalize."""
    return mk.FusedMoEKernel(
        MoEPrepareAndFinalizeNoDPEPModular(), Nf4LoRAExperts(moe, quant_config, weights, residual_scale, packed)
    )


class Nf4LoRAExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):
    """Takes lora_A, lora_B and the tokens' adapters from the context that vLLM's LoRA layer sets.

    `weights`: the base's, as `torch.ops.gptoss_nf4.used_experts` names them. `residual_scale`: the stream's residual_scale.
    `packed`: the weights are in the kernels' order, and `packed_experts` takes them.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        weights: dict,
        residual_scale: float,
        packed: bool,
    ):
        super().__init__(moe, quant_config)
        self.weights = weights
        self.residual_scale = residual_scale
        self.packed = packed

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        **unused: object,
    ) -> None:
        """hidden_states [tokens, hidden], topk_* [tokens, k] -> output [tokens, hidden], summed over k."""
        context = self._lora_context
        factors = {
            "w13_lora_a": context.w13_lora_a_stacked[0],
            "w13_lora_b": context.w13_lora_b_stacked[0],
            "w2_lora_a": context.w2_lora_a_stacked[0],
            "w2_lora_b": context.w2_lora_b_stacked[0],
            "w2_lora_scale": self.residual_scale,
        }
        routing = hidden_states, topk_weights, topk_ids, expert_map
        if self.packed:
            torch.ops.gptoss_nf4.packed_experts_with_adapters(
                output, *routing, global_num_experts, **self.weights, **mapping(context.punica_wrapper), **factors
            )
        else:
            adapters = adapters_of_tokens(context.punica_wrapper, len(hidden_states))
            output.copy_(torch.ops.gptoss_nf4.used_experts(*routing, **self.weights, adapters=adapters, **factors))

    # What vLLM asks of every experts class. Ours sums over k itself and needs no buffers but the output.

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *unused: object) -> tuple[tuple[int, ...], ...]:
        return (0,), (0,), (M, K)

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: object, activation_key: object) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SWIGLUOAI

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True


def mapping(punica_wrapper: PunicaWrapperBase) -> dict[str, torch.Tensor | None]:
    """Which adapter each token has, as the operators of `ops` take it: buffers that vLLM fills before a step.

    They are the same ones in every step, as a CUDA graph needs it. Only vLLM's wrapper for GPUs has the flag for steps
    without adapters.
    """
    meta = getattr(punica_wrapper, "token_mapping_meta", None)
    no_lora = None if meta is None else meta.no_lora_flag_cpu
    return {"adapters": punica_wrapper._token_lora_indices, "no_lora": no_lora}


def adapters_of_tokens(punica_wrapper: PunicaWrapperBase, tokens: int) -> torch.Tensor:
    """int64 [tokens]: place of each token's adapter in the stacks, -1 for none.

    Before the first mapping is set, and for tokens beyond it (vLLM warms up with more than it maps), that is none.
    """
    found = torch.full((tokens,), -1, dtype=torch.long, device=punica_wrapper.device)
    if punica_wrapper.indices_len[0] is not None:
        mapped = punica_wrapper.token_lora_indices[:tokens]
        found[: len(mapped)] = mapped
    return found

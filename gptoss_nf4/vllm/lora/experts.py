"""The experts with each token's adapter, in the place where vLLM looks for a kernel that knows LoRA."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from gptoss_nf4.vllm import experts  # noqa: F401  (registers torch.ops.gptoss_nf4)


def kernel_with_lora(
    moe: FusedMoEConfig, quant_config: FusedMoEQuantConfig, weights: dict, residual_scale: float
) -> mk.FusedMoEKernel:
    """What vLLM wraps in its LoRA layer: nothing to prepare, our experts, nothing to finalize."""
    return mk.FusedMoEKernel(
        MoEPrepareAndFinalizeNoDPEPModular(), Nf4LoRAExperts(moe, quant_config, weights, residual_scale)
    )


class Nf4LoRAExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):
    """Takes lora_A, lora_B and the tokens' adapters from the context that vLLM's LoRA layer sets.

    `weights`: the base's, as `torch.ops.gptoss_nf4.used_experts` names them. `residual_scale`: the stream's residual_scale.
    """

    def __init__(self, moe: FusedMoEConfig, quant_config: FusedMoEQuantConfig, weights: dict, residual_scale: float):
        super().__init__(moe, quant_config)
        self.weights = weights
        self.residual_scale = residual_scale

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
        output.copy_(
            torch.ops.gptoss_nf4.used_experts(
                hidden_states,
                topk_weights,
                topk_ids,
                expert_map,
                **self.weights,
                adapters=adapters_of_tokens(context.punica_wrapper, len(hidden_states)),
                w13_lora_a=context.w13_lora_a_stacked[0],
                w13_lora_b=context.w13_lora_b_stacked[0],
                w2_lora_a=context.w2_lora_a_stacked[0],
                w2_lora_b=context.w2_lora_b_stacked[0],
                w2_lora_scale=self.residual_scale,
            )
        )

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


def adapters_of_tokens(punica_wrapper: PunicaWrapperBase, tokens: int) -> torch.Tensor:
    """int64 [tokens]: place of each token's adapter in the stacks, -1 for none.

    Before the first mapping is set, and for tokens beyond it (vLLM warms up with more than it maps), that is none.
    """
    found = torch.full((tokens,), -1, dtype=torch.long, device=punica_wrapper.device)
    if punica_wrapper.indices_len[0] is not None:
        mapped = punica_wrapper.token_lora_indices[:tokens]
        found[: len(mapped)] = mapped
    return found

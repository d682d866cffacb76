"""NF4 experts in vLLM, with expert bias and gpt-oss's clamped SwiGLU."""

from itertools import pairwise

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig, biased_moe_quant_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import OUTPUTS
from gptoss_nf4.vllm import experts, ops  # noqa: F401  (register torch.ops.gptoss_nf4)
from gptoss_nf4.vllm.dequantize import dequantize
from gptoss_nf4.vllm.expert_weights import W2, W13, ExpertWeight, Part, blocks_of_rank
from gptoss_nf4.vllm.kernels.tiles import MIN_INPUTS, fitting_power
from gptoss_nf4.vllm.loading import (
    Loader,
    current_device,
    most_tokens,
    register_parameter,
    require_filled,
    runs_on_kernels,
)
from gptoss_nf4.vllm.proving.prepare import all_work
from gptoss_nf4.vllm.proving.products import Experts
from gptoss_nf4.vllm.settings import Settings
from gptoss_nf4.vllm.transfer import Transfer


class Nf4MoEMethod(FusedMoEMethodBase):
    """w13 and w2 as codes and absmax of this rank's experts; gate and up rows interleaved in memory."""

    def __init__(self, settings: Settings, moe: FusedMoEConfig, prefix: str, transfer: Transfer):
        super().__init__(moe)
        self.settings = settings
        self.prefix = prefix
        self.transfer = transfer
        if moe.activation != MoEActivation.SWIGLUOAI or not moe.has_bias:
            raise UserError(
                "unsupported experts",
                where=prefix,
                got=f"activation {moe.activation}, bias {moe.has_bias}",
                expected="gpt-oss's swigluoai with bias",
                next_step="use a vLLM version that the plugin was tested with",
            )
        self.chooses = False

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register codes, absmax and bias of w13 and w2: see `expert_weights`."""
        parallel = self.moe.moe_parallel_config
        product = self._product(num_experts, hidden_size, intermediate_size_per_partition, params_dtype)
        packed = self.packs(product)
        shared = {"settings": self.settings, "tp_rank": parallel.tp_rank, "packed": packed, "prefix": self.prefix}
        layer.nf4_packed, layer.nf4_products = packed, [product]
        self.chooses = packed and product.of_logits
        layer.nf4_w13 = W13(2 * intermediate_size_per_partition, hidden_size, tp_size=parallel.tp_size, **shared)
        layer.nf4_w2 = W2(hidden_size, intermediate_size_per_partition, tp_size=parallel.tp_size, **shared)
        for weight in (layer.nf4_w13, layer.nf4_w2):
            for part in weight.parts(num_experts, params_dtype):
                kept = part.kept(torch.empty(part.shape, dtype=part.dtype, device="meta"))
                load = self._loader(layer, part)
                register_parameter(layer, self.prefix, part.name, kept.shape, kept.dtype, load)

    def packs(self, product: Experts) -> bool:
        """Whether the weights are kept in the kernels' order. UserError where a rank's inputs are no whole tiles."""
        if not runs_on_kernels(product.dtype):
            return False
        for name, inputs in ((W13.name, product.hidden), (W2.name, product.intermediate)):
            if inputs % MIN_INPUTS:  # possible only where blocks run along the outputs
                raise UserError(
                    "tensor parallel size does not fit",
                    where=f"{self.prefix}.{name}",
                    got=f"{inputs} inputs for each rank",
                    expected=f"a multiple of {MIN_INPUTS}",
                    next_step="use a smaller tensor_parallel_size, or expert parallelism",
                )
        return all_work([product], current_device())

    def _product(self, num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> Experts:
        """What the kernels have to compute for a layer of these widths, of this rank."""
        w13_along, w13_blocksize = blocks_of_rank(self.settings, W13.name, 2 * intermediate, hidden, self.prefix)
        w2_along, w2_blocksize = blocks_of_rank(self.settings, W2.name, hidden, intermediate, self.prefix)
        return Experts(
            hidden=hidden,
            intermediate=intermediate,
            w13_blocksize=w13_blocksize,
            w2_blocksize=w2_blocksize,
            quant_type=self.settings.quant_type,
            dtype=dtype,
            experts=self.moe.num_experts,
            here=num_experts,
            top_k=self.moe.experts_per_token,
            most_tokens=most_tokens(),
            of_logits=self._may_choose(),
            w13_blocks_along=w13_along,
            w2_blocks_along=w2_along,
        )

    def _may_choose(self) -> bool:
        """Whether nobody but the experts needs to know which ones a token went to."""
        config = get_current_vllm_config_or_none()
        told = config is not None and config.aux_output_config.enable_return_routed_experts
        parallel = self.moe.moe_parallel_config
        shared = parallel.enable_eplb or parallel.dp_size > 1 or parallel.pcp_size > 1
        return not (told or shared or self.moe.is_lora_enabled or envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY)

    def _loader(self, layer: RoutedExperts, part: Part) -> Loader:
        """How the checkpoint's tensor, of all experts, becomes this rank's parameter: see `Transfer`."""

        def load(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
            local = _local_experts(layer, tensor)
            found = part.of_rank(torch.empty_like(local, device="meta")).shape
            if found != part.shape:
                raise UserError(
                    "wrong shape",
                    where=f"{self.prefix}.{part.name}",
                    got=list(found),
                    expected=list(part.shape),
                    next_step="convert the checkpoint again",
                )

            def keep(first: int, rows: torch.Tensor) -> None:
                part.check(rows)
                kept = part.kept(rows.to(parameter.device))
                parameter.data[first : first + len(kept)].copy_(kept)

            self.transfer.each(local, part.of_rank, keep)

        return load

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        require_filled(layer)
        for weight, absmax in ((layer.nf4_w13, layer.w13_absmax), (layer.nf4_w2, layer.w2_absmax)):
            if weight.packed and weight.blocks_along == OUTPUTS:
                power = fitting_power(absmax.data)
                absmax.data.mul_(power)
                weight.absmax_factor *= power
        if self.moe.is_lora_enabled:
            self._prepare_for_lora(layer)

    def _prepare_for_lora(self, layer: RoutedExperts) -> None:
        """Give the layer what vLLM's LoRA wrapper looks for: a kernel that knows LoRA, and weights under known names."""
        from gptoss_nf4.vllm.lora.experts import kernel_with_lora

        if layer.w13_codes.device.type != "cpu" and not layer.nf4_packed:
            in_float32 = layer.w13_expert_bias.dtype == torch.float32
            raise UserError(
                "adapters are served on a GPU by our kernels alone",
                where=self.prefix,
                got="--enable-lora "
                + ("--dtype float32" if in_float32 else "and kernels that are not used, see the warning"),
                expected="kernels, in float16 or bfloat16, or the CPU",
                next_step="serve without " + ("--dtype float32" if in_float32 else "--enable-lora, or mend that first"),
            )
        # For their device and number of experts; vLLM insists on three dimensions.
        layer.w13_weight, layer.w2_weight = layer.w13_codes.data.flatten(1, -2), layer.w2_codes.data.flatten(1, -2)
        quant_config, scale = self.get_fused_moe_quant_config(layer), self.settings.residual_scale
        self.moe_kernel = kernel_with_lora(self.moe, quant_config, self._weights(layer), scale, layer.nf4_packed)

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM leaves the choice of experts to `apply_monolithic`, which does it in the experts' own kernels."""
        return self.chooses

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return biased_moe_quant_config(layer.w13_expert_bias, layer.w2_expert_bias)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden], topk_* [tokens, k] with global expert numbers -> [tokens, hidden]."""
        weights = self._weights(layer)
        if layer.nf4_packed:
            return torch.ops.gptoss_nf4.packed_experts(
                x, topk_weights, topk_ids, layer.expert_map, layer.global_num_experts, **weights
            )
        if x.device.type == "cpu":
            return torch.ops.gptoss_nf4.used_experts(x, topk_weights, topk_ids, layer.expert_map, **weights)
        return self._dequantize_all(layer, x, topk_weights, topk_ids)

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden], router_logits [tokens, experts] -> [tokens, hidden]."""
        tells = envs.VLLM_MOE_SKIP_PADDING and is_forward_context_available()
        is_padding = get_forward_context().is_padding if tells else None
        return torch.ops.gptoss_nf4.packed_experts_of_logits(
            x, router_logits, self.moe.experts_per_token, is_padding, layer.expert_map, **self._weights(layer)
        )

    def _weights(self, layer: RoutedExperts) -> dict:
        """The layer's weights as the operators name them."""
        w13, w2 = layer.nf4_w13, layer.nf4_w2
        factors = {"w13_absmax_factor": w13.absmax_factor, "w2_absmax_factor": w2.absmax_factor}
        return {
            "w13_codes": layer.w13_codes,
            "w13_absmax": layer.w13_absmax,
            "w13_bias": layer.w13_expert_bias,
            "w13_blocksize": w13.blocksize,
            "w13_blocks_along": w13.blocks_along,
            "w2_codes": layer.w2_codes,
            "w2_absmax": layer.w2_absmax,
            "w2_bias": layer.w2_expert_bias,
            "w2_blocksize": w2.blocksize,
            "w2_blocks_along": w2.blocks_along,
            "quant_type": self.settings.quant_type,
        } | (factors if layer.nf4_packed else {})

    def _dequantize_all(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """vLLM's dense experts, for float32 on a GPU: correct, and as slow as moving all weights in every step.

        Asking which experts are in use would stall the GPU and break CUDA graphs.
        """
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        def dense(codes: torch.Tensor, absmax: torch.Tensor, weight: ExpertWeight) -> torch.Tensor:
            return dequantize(
                codes, absmax, weight.blocksize, self.settings.quant_type, x.dtype, blocks_along=weight.blocks_along
            )

        return fused_experts(
            x,
            dense(layer.w13_codes, layer.w13_absmax, layer.nf4_w13),
            dense(layer.w2_codes, layer.w2_absmax, layer.nf4_w2),
            topk_weights,
            topk_ids,
            activation=MoEActivation.SWIGLUOAI,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            quant_config=self.get_fused_moe_quant_config(layer),
        )


def _local_experts(layer: RoutedExperts, tensor: torch.Tensor) -> torch.Tensor:
    """The experts of this rank, in the order of their local numbers (all of them without expert parallelism)."""
    if layer.expert_map is None:
        return tensor
    expert_map = layer.expert_map.cpu()
    here = (expert_map >= 0).nonzero().flatten()
    numbers = here[expert_map[here].argsort()].tolist()
    steps = {after - before for before, after in pairwise(numbers)} or {1}
    if numbers and len(steps) == 1 and (step := steps.pop()) > 0:
        return tensor[numbers[0] : numbers[-1] + 1 : step]  # a view: nothing of other ranks is read
    return tensor[numbers]

"""The router on our kernel: a dense layer of so few rows that vLLM's product takes longer than its bytes ask for."""

import torch
from vllm import envs
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from gptoss_nf4.vllm import ops  # noqa: F401  (registers torch.ops.gptoss_nf4)
from gptoss_nf4.vllm.loading import current_device, most_tokens, runs_on_kernels
from gptoss_nf4.vllm.proving.prepare import all_work
from gptoss_nf4.vllm.proving.products import Router


class RouterMethod(UnquantizedLinearMethod):
    """Weights as in vLLM's own method."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, experts], in x's dtype."""
        return torch.ops.gptoss_nf4.router(x, layer.weight, bias)


def use_kernel(model: torch.nn.Module) -> None:
    """Give our method to each router of `model` that it can compute. vLLM's class takes no method of ours."""
    for module in model.modules():
        if isinstance(module, GateLinear) and _fits(module):
            module.quant_method = RouterMethod()


def _fits(router: GateLinear) -> bool:
    if envs.VLLM_BATCH_INVARIANT:
        return False
    weight, bias = router.weight, router.bias
    if not runs_on_kernels(weight.dtype) or bias is None or type(router.quant_method) is not UnquantizedLinearMethod:
        return False
    experts, hidden = weight.shape
    return all_work([Router(experts, hidden, weight.dtype, most_tokens())], current_device())

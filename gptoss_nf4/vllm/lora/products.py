"""What a layer computes where the engine serves adapters: products for `proving`, by the sizes of vLLM's stacks."""

from dataclasses import replace

import torch

from gptoss_nf4.vllm.lora.linear import DenseLinear, PackedLinear
from gptoss_nf4.vllm.proving.inputs import Adapters
from gptoss_nf4.vllm.proving.products import DenseAdapters, Product


def products_with_adapters(module: torch.nn.Module, most_tokens: int) -> list[Product]:
    """Those of a module that vLLM has wrapped; none where our kernels have no part in it. most_tokens: of a step."""
    if isinstance(module, PackedLinear):
        return [replace(product, adapters=_adapters(module)) for product in module.base_layer.nf4_products]
    if isinstance(module, DenseLinear):
        _, _, rows, _ = module.nf4_lora_b.shape
        _, _, _, inputs = module.nf4_lora_a.shape
        dtype = module.nf4_lora_a.dtype
        # A router may have its results in float32.
        return [
            DenseAdapters(rows, inputs, dtype, out_dtype, most_tokens, _adapters(module))
            for out_dtype in (dtype, torch.float32)
        ]
    layer = getattr(module.base_layer, "routed_experts", None)
    if layer is None or not layer.nf4_packed:
        return []
    stacks = {"w13_adapters": module.w13_lora_a_stacked[0], "w2_adapters": module.w2_lora_a_stacked[0]}
    sizes = {name: Adapters(held=stack.shape[0], rank=stack.shape[2]) for name, stack in stacks.items()}
    return [replace(product, **sizes) for product in layer.nf4_products]


def _adapters(module: PackedLinear | DenseLinear) -> Adapters:
    held, _, _, rank = module.nf4_lora_b.shape
    return Adapters(held, rank, tuple(module.nf4_lora_ends))

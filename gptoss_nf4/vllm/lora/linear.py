"""Linear layers with adapters on our kernels, in place of vLLM's three launches for each.

vLLM's wrapper of a layer keeps a stack of lora_A and one of lora_B for each slice of its rows (q, k and v), and fills them.
The kernels take one of each for the whole layer. So the layer gets these, and vLLM's stacks become views into them.
"""

from itertools import accumulate

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from gptoss_nf4.vllm.kernels.tiles import ROWS
from gptoss_nf4.vllm.linear import Nf4LinearMethod
from gptoss_nf4.vllm.lora.experts import mapping


def runs_on_kernels(module: torch.nn.Module) -> bool:
    """Whether a wrapped layer of vLLM, linear or experts, is of packed weights."""
    base = getattr(module, "base_layer", None)
    return bool(getattr(getattr(base, "routed_experts", base), "nf4_packed", False))


def use_kernels(module: BaseLinearLayerWithLoRA) -> None:
    """Exchange the stacks of `module`, and its `apply`, which its forward calls before any all-reduce of ranks.

    With fully sharded stacks, which `attach` refuses, this would be wrong.
    """
    sizes = [stack.shape[2] for stack in module.lora_b_stacked]
    ends = list(accumulate(sizes)) if len(sizes) > 1 else []
    if any(end % ROWS for end in ends[:-1]):
        return  # a tile of rows would belong to two slices: no model has such heads
    lora_a, module.lora_a_stacked = joined(module.lora_a_stacked)
    lora_b, module.lora_b_stacked = joined(module.lora_b_stacked)
    base, method = module.base_layer, module.base_layer.quant_method

    def apply_packed(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tokens = mapping(module.punica_wrapper)
        return method.apply(base, x, bias, lora_a=lora_a, lora_b=lora_b, lora_ends=ends, **tokens)

    def add_to_result(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        flat = output.view(-1, output.shape[-1])
        tokens = mapping(module.punica_wrapper)
        torch.ops.gptoss_nf4.add_adapters(
            flat, x.reshape(-1, x.shape[-1]), lora_a=lora_a, lora_b=lora_b, lora_ends=ends, **tokens
        )
        return output

    if isinstance(method, Nf4LinearMethod) and base.nf4_packed:
        module.apply = apply_packed
    else:
        module._apply_lora_to_output = add_to_result


def joined(stacks: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Stacks [adapters, 1, rows of a slice, columns] as one [adapters, 1, rows, columns], and as views into it."""
    whole = torch.cat(stacks, dim=2)
    return whole, whole.split([stack.shape[2] for stack in stacks], dim=2)

"""Linear layers with adapters on our kernels, in place of vLLM's three launches for each.

vLLM's wrapper of a layer keeps a stack of lora_A and one of lora_B for each slice of its rows (q, k and v), and fills them.
The kernels take one of each for the whole layer. So the layer gets these, and vLLM's stacks become views into them.
"""

from functools import cache
from itertools import accumulate

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from gptoss_nf4.vllm.kernels.tiles import ROWS
from gptoss_nf4.vllm.linear import Nf4LinearMethod
from gptoss_nf4.vllm.lora.experts import mapping


def use_kernels(module: BaseLinearLayerWithLoRA) -> None:
    """Let a wrapped layer run on our kernels. `attach` has refused fully sharded stacks, which they do not know."""
    sizes = [stack.shape[2] for stack in module.lora_b_stacked]
    ends = list(accumulate(sizes)) if len(sizes) > 1 else []
    if any(end % ROWS for end in ends[:-1]):
        return  # a tile of rows would belong to two slices; no gpt-oss has such heads
    module.nf4_lora_a, module.lora_a_stacked = joined(module.lora_a_stacked)
    module.nf4_lora_b, module.lora_b_stacked = joined(module.lora_b_stacked)
    module.nf4_lora_ends = ends
    module._enable_aux_cuda_stream = False  # vLLM's operator for a second stream does not take views
    packed = isinstance(module.base_layer.quant_method, Nf4LinearMethod) and module.base_layer.nf4_packed
    wrapper: type = type(module)
    module.__class__ = _on_kernels(wrapper, PackedLinear if packed else DenseLinear)


def joined(stacks: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Stacks [adapters, 1, rows of a slice, columns] as one [adapters, 1, rows, columns], and as views into it."""
    whole = torch.cat(stacks, dim=2)
    return whole, whole.split([stack.shape[2] for stack in stacks], dim=2)


class OnKernels:
    """What is mixed into vLLM's class of a wrapped layer. Everything else, like the all-reduce of ranks, is vLLM's."""

    nf4_lora_a: torch.Tensor
    nf4_lora_b: torch.Tensor
    nf4_lora_ends: list[int]
    # Of vLLM's class:
    base_layer: torch.nn.Module
    punica_wrapper: PunicaWrapperBase

    def factors(self) -> dict[str, object]:
        """The fields of `kernels.lora.Factors` as the operators of `ops` name them."""
        return {
            "lora_a": self.nf4_lora_a,
            "lora_b": self.nf4_lora_b,
            "lora_ends": self.nf4_lora_ends,
            **mapping(self.punica_wrapper),
        }


class PackedLinear(OnKernels):
    """A layer of 4-bit weights: of few rows, B @ (A @ x) is added within its product."""

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.base_layer.quant_method.apply(self.base_layer, x, bias, **self.factors())


class DenseLinear(OnKernels):
    """The router, or an attention projection that the checkpoint has not quantized."""

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        flat_output, flat_x = output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
        torch.ops.gptoss_nf4.add_adapters(flat_output, flat_x, **self.factors())
        return output


@cache
def _on_kernels(wrapper: type, mixin: type) -> type:
    """vLLM's class of a wrapped layer with ours in front. It keeps its name, by which vLLM tells its classes apart.

    A class, and no function on the instance, since torch.compile has to see through it.
    """
    return type(wrapper.__name__, (mixin, wrapper), {})

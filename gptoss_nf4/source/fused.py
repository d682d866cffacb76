"""The layout that transformers has: the experts of a layer fused into one tensor, [experts, inputs, outputs].

`mlp.experts.gate_up_proj` is [E, hidden, 2 * intermediate] with gate and up interleaved along the outputs, and
`mlp.experts.down_proj` is [E, intermediate, hidden] (transformers `modeling_gpt_oss.py` GptOssExperts). Each expert is the
transpose of the canonical weight. Beside them lie `gate_up_proj_bias` and `down_proj_bias`. Three kinds are met:

- all in 16 bit, as `save_pretrained` writes a model that was never quantized;
- attention in 4 bit and experts in 16 bit, which transformers 5 makes of `load_in_4bit`: it quantizes linear modules only;
- experts in 4 bit too, as bitsandbytes' `replace_parameter_4bit` and newer Unsloth store them. Blocks run through the flat
  tensor, so along the outputs of one input.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.source.interface import OUTPUTS, Floating, Module
from gptoss_nf4.source.packed import Packed
from gptoss_nf4.source.stored import StoredSource
from gptoss_nf4.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

_STACK = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.(?:gate_up|down)_proj)s\.(\d+)")


class FusedSource(StoredSource):
    """A checkpoint with fused experts, in 16, 32 or 4 bit."""

    layout = "fused"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return any(_STACK.search(key) for key in checkpoint.tensors)

    def module(self, name: str, shape: tuple[int, int]) -> Module:
        if not (place := _EXPERT.fullmatch(name)):
            return super().module(name, shape)
        packed = Packed.find(self.checkpoint, place[1])
        if packed is None:
            return Module(name, shape, None)
        module = Module(name, shape, replace(packed.state, shape=(shape[1], shape[0])), OUTPUTS)
        if _elements(module) % packed.state.blocksize:
            raise UserError(
                "blocks run across experts",
                where=place[1],
                got=f"{_elements(module)} weights in an expert and blocksize {packed.state.blocksize}",
                expected="a blocksize that divides the weights of an expert",
                next_step="save the model in 16 bit",
            )
        return module

    def codes(self, module: Module) -> np.ndarray:
        if not (place := _EXPERT.fullmatch(module.name)):
            return super().codes(module)
        expert, elements = int(place[2]), _elements(module)
        return self.packed(place[1]).codes(expert * elements, (expert + 1) * elements)

    def absmax(self, module: Module) -> np.ndarray:
        if not (place := _EXPERT.fullmatch(module.name)):
            return super().absmax(module)
        packed, expert = self.packed(place[1]), int(place[2])
        blocks = _elements(module) // packed.state.blocksize
        return packed.absmax(expert * blocks, (expert + 1) * blocks)

    def floating(self, name: str) -> Floating:
        module, _, kind = name.rpartition(".")
        if not (place := _EXPERT.fullmatch(module)):
            return super().floating(name)
        stored, expert = place[1] if kind == "weight" else f"{place[1]}_bias", int(place[2])
        info = self.checkpoint.tensors[stored]

        def read() -> "Iterator[torch.Tensor]":
            yield self.checkpoint.torch_row(stored, expert).transpose(0, -1).reshape(-1)  # of a bias: itself

        return Floating(name, stored, info.dtype, info.shape[:0:-1], read)

    def stored(self, module: Module) -> dict[str, str]:
        """Those of the whole tensor, which all experts share."""
        place = _EXPERT.fullmatch(module.name)
        return self.packed(place[1]).stored if place else super().stored(module)

    def module_tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        experts, seen = self.dimensions.experts, set()
        for name, shape in super().module_tensors(layer):
            module, _, kind = name.rpartition(".")
            if not (place := _EXPERT.fullmatch(module)):
                yield name, shape
                continue
            stored = place[1] if kind == "weight" else f"{place[1]}_bias"
            if stored not in seen:
                seen.add(stored)
                yield stored, (experts, *shape[::-1])


def _elements(module: Module) -> int:
    return module.shape[0] * module.shape[1]

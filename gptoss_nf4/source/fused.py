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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import OUTPUTS
from gptoss_nf4.source.interface import Floating, Module
from gptoss_nf4.source.packed import Packed
from gptoss_nf4.source.stored import StoredSource
from gptoss_nf4.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

_STACK = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.(?:gate_up|down)_proj)s\.(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class _Place:
    """Where an expert's weight or bias lies: the stored name of the stack, and its number there."""

    stack: str
    expert: int


def _place(name: str) -> _Place | None:
    """The place of the tensor of that canonical name. None where it is no expert's."""
    found = _EXPERT.fullmatch(name)
    return _Place(found[1] + ("_bias" if found[3] == "bias" else ""), int(found[2])) if found else None


class FusedSource(StoredSource):
    """A checkpoint with fused experts, in 16, 32 or 4 bit. Those of some layers, or of w13 or w2, may lie by themselves."""

    layout = "fused"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return any(_STACK.search(key) for key in checkpoint.tensors)

    def _place(self, name: str) -> _Place | None:
        """The place of the tensor of that canonical name. None where it is no expert's, or lies there under that name."""
        place = _place(name)
        return None if place and place.stack not in self.checkpoint.tensors and name in self.checkpoint.tensors else place

    def module(self, name: str, shape: tuple[int, int]) -> Module:
        place = self._place(f"{name}.weight")
        if place is None:
            return super().module(name, shape)
        packed = Packed.find(self.checkpoint, place.stack)
        if packed is None:
            return Module(name, shape, None)
        module = Module(name, shape, replace(packed.state, shape=(shape[1], shape[0])), OUTPUTS)
        if _elements(module) % packed.state.blocksize:
            raise UserError(
                "blocks run across experts",
                where=place.stack,
                got=f"{_elements(module)} weights in an expert and blocksize {packed.state.blocksize}",
                expected="a blocksize that divides the weights of an expert",
                next_step="save the model in 16 bit",
            )
        return module

    def codes(self, module: Module) -> np.ndarray:
        place = self._place(module.weight)
        if place is None:
            return super().codes(module)
        elements = _elements(module)
        return self.packed(place.stack).codes(place.expert * elements, (place.expert + 1) * elements)

    def absmax(self, module: Module) -> np.ndarray:
        place = self._place(module.weight)
        if place is None:
            return super().absmax(module)
        packed = self.packed(place.stack)
        blocks = _elements(module) // packed.state.blocksize
        return packed.absmax(place.expert * blocks, (place.expert + 1) * blocks)

    def floating(self, name: str) -> Floating:
        place = self._place(name)
        if place is None:
            return super().floating(name)
        info = self.checkpoint.tensors[place.stack]

        def read() -> "Iterator[torch.Tensor]":
            expert = self.checkpoint.torch_row(place.stack, place.expert)
            yield expert.transpose(0, -1).reshape(-1)  # a bias has one dimension and stays as it is

        return Floating(name, place.stack, info.dtype, info.shape[:0:-1], read)

    def stored(self, module: Module) -> dict[str, str]:
        """Those of the whole stack, which all its experts share."""
        place = self._place(module.weight)
        return super().stored(module) if place is None else self.packed(place.stack).stored

    def module_tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in super().module_tensors(layer):
            place = self._place(name)
            if place is None:
                yield name, shape
            elif place.expert == 0:
                yield place.stack, (self.dimensions.experts, *shape[::-1])


def _elements(module: Module) -> int:
    return module.shape[0] * module.shape[1]

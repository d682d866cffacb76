"""The one interface that every source has, whatever layout its files are in.

A stage asks for modules and floating tensors by their canonical names (`format/names.py`), never by stored ones. To read
another layout takes a subclass of `Source` in a file of its own, and one entry in `layouts.LAYOUTS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.format import names
from gptoss_nf4.format.blocks import INPUTS
from gptoss_nf4.format.codec import CODEBOOKS, dequantize
from gptoss_nf4.format.config_fields import served_config
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.quant_state import QuantState
from gptoss_nf4.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Module:
    """One weight matrix and how it is quantized.

    `name` is canonical and full. `shape` is logical: [out_features, in_features]. `state` is None where the source left
    the weight in 16 or 32 bit; `blocks_along`, a direction of `format/blocks.py`, has no meaning then. Where that is the
    outputs, codes and absmax are those of the transposed weight, [in_features, out_features], and so is `state.shape`.
    """

    name: str
    shape: tuple[int, int]
    state: QuantState | None
    blocks_along: str = INPUTS

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"


def becomes_dense(fusion: names.Fusion, parts: Sequence[Module]) -> bool:
    """Whether what `fusion` makes of `parts` is stored dense: q, k and v are, or o_proj, where any part is not 4-bit.

    Stacked experts are always 4-bit: mode nf4 quantizes a dense one, and mode exact refuses it.
    """
    return not fusion.stacked and any(part.state is None for part in parts)


@dataclass(frozen=True)
class Floating:
    """A tensor that is not 4-bit.

    `name` is canonical. `stored` is its name in the source, for messages. `dtype` is a safetensors name such as "BF16".
    `read` gives its values in order: flat tensors of some megabytes. `dequantized` says that the source has it in 4 bit:
    `read` gives float32 then.
    """

    name: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], "Iterator[torch.Tensor]"]
    dequantized: bool = False

    def tensor(self) -> "torch.Tensor":
        """The whole tensor, in its own shape and dtype."""
        import torch

        return torch.cat(list(self.read())).reshape(self.shape)


class Source(ABC):
    """A gpt-oss checkpoint that somebody else wrote. A tensor is read only when it is asked for."""

    layout: str  # its name in manifests and messages
    renamed: Mapping[str, int] = {}  # wrapper -> number of names from which it was removed (`wrappers.py`)

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        where = checkpoint.directory / "config.json"
        self.config = served_config(checkpoint.config, where)  # with transformers' defaults
        self.dimensions = Dimensions.from_config(self.config, where)

    @classmethod
    @abstractmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` is in this layout, by the names of its tensors."""

    @abstractmethod
    def validate(self) -> None:
        """Check presence, dtype and shape of every tensor against config.json; raise a UserError for the first fault."""

    @abstractmethod
    def module(self, name: str, shape: tuple[int, int]) -> Module:
        """The module of that canonical name; `shape` is its logical one. UserError for a damaged quantization state."""

    @abstractmethod
    def codes(self, module: Module) -> np.ndarray:
        """Codes of a 4-bit module, uint8 [elements / 2], the first element in the high nibble."""

    @abstractmethod
    def absmax(self, module: Module) -> np.ndarray:
        """absmax of a 4-bit module, float32 [blocks], after undoing double quantization."""

    @abstractmethod
    def floating(self, name: str) -> Floating:
        """The tensor of that canonical name: a bias, a norm, or a weight that is not 4-bit or that no fusion takes."""

    @abstractmethod
    def stored(self, module: Module) -> dict[str, str]:
        """The stored names of a 4-bit module's tensors.

        Keys are "weight", "absmax", "quant_map", "quant_state"; with double quantization also "nested_absmax" and
        "nested_quant_map".
        """

    def modules(self, layer: int, fusion: names.Fusion) -> list[Module]:
        """The modules that `fusion` takes in `layer`, in order."""
        return [
            self.module(name, shape) for other, name, shape in names.modules_of(self.dimensions, layer) if other == fusion
        ]

    def dequantized(self, module: Module) -> np.ndarray:
        """The weight of a 4-bit module by our own codec, float32 of its shape. ValueError if it is not 4-bit."""
        if module.state is None:
            raise ValueError(f"{module.name} is not 4-bit")
        codebook, state = CODEBOOKS[module.state.quant_type], module.state
        weight = dequantize(self.codes(module), self.absmax(module), codebook, state.blocksize, state.shape)
        return weight if module.blocks_along == INPUTS else np.ascontiguousarray(weight.T)

    def notes(self) -> list[str]:
        """What is to be told of this source before it is converted, a line each. Empty for a published one."""
        lines = [f"{wrapper!r} is removed from {count} names" for wrapper, count in self.renamed.items()]
        expert = self.modules(0, names.W13)[0]
        if expert.state is None:
            lines.append("the experts were never 4-bit: requant.mode=nf4 quantizes them and reports the error it adds")
        kept = [*names.outside_shapes(self.dimensions), *(names.prefix(0) + n for n in names.kept_shapes(self.dimensions))]
        dense = [name for name in kept if self.floating(name).dequantized]
        if dense:
            lines.append(f"4-bit in the source, dense in the result: {', '.join(dense)}")
        return lines

    @cached_property
    def stored_by_layer(self) -> dict[int | None, list[str]]:
        """Stored tensor names by layer, sorted. Those outside the layers stand under None."""
        found: dict[int | None, list[str]] = {}
        for name in sorted(self.checkpoint.tensors):
            found.setdefault(names.layer_of(name), []).append(name)
        return found

    def forget(self, layer: int) -> None:
        """Tell the system that `layer` will not be read again: see `Checkpoint.forget`."""
        self.checkpoint.forget(self.stored_by_layer[layer])

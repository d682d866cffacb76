"""What the layouts share: tensors under canonical names, any of them 4-bit with bitsandbytes' sidecars, or floating.

A weight that a conversion keeps dense (router, embeddings, head) may be 4-bit too: it is dequantized when it is read.
"""

from collections.abc import Iterator

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.source.interface import Floating, Module, Source
from gptoss_nf4.source.packed import Packed, require_tensor, require_weight

# Other names that a tensor may have, within a layer. When the split layout was made, the router's linear module was
# wrapped in another.
ALIASES = {
    "mlp.router.weight": "mlp.router.linear.weight",
    "mlp.router.bias": "mlp.router.linear.bias",
}


class StoredSource(Source):
    """A checkpoint whose attention and router lie under canonical names. `Source` documents the methods.

    A layout says where the experts are: under canonical names, unless a subclass overrides the methods that ask for them.
    """

    def module(self, name: str, shape: tuple[int, int]) -> Module:
        packed = Packed.find(self.checkpoint, f"{name}.weight")
        return Module(name, shape, packed.state if packed else None)

    def codes(self, module: Module) -> np.ndarray:
        return self.packed(module.weight).codes()

    def absmax(self, module: Module) -> np.ndarray:
        return self.packed(module.weight).absmax()

    def floating(self, name: str) -> Floating:
        stored = self.stored_name(name)
        packed = Packed.find(self.checkpoint, stored)
        if packed is not None:
            return Floating(name, stored, "F32", packed.state.shape, packed.pieces, dequantized=True)
        info = self.checkpoint.tensors[stored]
        return Floating(name, stored, info.dtype, info.shape, lambda: self.checkpoint.torch_pieces(stored))

    def stored(self, module: Module) -> dict[str, str]:
        return self.packed(module.weight).stored

    def packed(self, stored: str) -> Packed:
        """The 4-bit tensor of that stored name. ValueError for any other: asking for its codes is a bug of ours."""
        packed = Packed.find(self.checkpoint, stored)
        if packed is None:
            raise ValueError(f"{stored} is not 4-bit")
        return packed

    def stored_name(self, name: str) -> str:
        """The name under which the tensor of that canonical name is stored."""
        layer = names.layer_of(name)
        if layer is None:
            return name
        prefix = names.prefix(layer)
        alias = prefix + ALIASES.get(name.removeprefix(prefix), "")
        return alias if alias in self.checkpoint.tensors else name

    def validate(self) -> None:
        known: set[str] = set()
        for layer in range(self.dimensions.layers):
            for stored, shape in self.module_tensors(layer):
                known |= require_weight(self.checkpoint, stored, shape)
            for name, kept in names.kept_shapes(self.dimensions).items():
                known |= require_weight(self.checkpoint, self.stored_name(names.prefix(layer) + name), kept)
        self._require_vocabulary()
        for name, outside in names.outside_shapes(self.dimensions).items():
            known |= require_weight(self.checkpoint, name, outside)
        extra = sorted(set(self.checkpoint.tensors) - known)
        if extra:
            raise UserError(
                "unknown tensor",
                where=self.checkpoint.tensors[extra[0]].file.name,
                got=f"{extra[0]} ({len(extra)} unknown in all)",
                expected=f"only tensors of the {self.layout} layout",
                next_step="remove what does not belong to the model, or report the layout",
            )

    def module_tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(stored name, stored shape) of the weights and biases of the layer's attention and experts."""
        for _, name, shape in names.modules_of(self.dimensions, layer):
            yield f"{name}.weight", shape
            yield f"{name}.bias", shape[:1]

    def _require_vocabulary(self) -> None:
        """UserError where embeddings and head are whole rows, but not as many as config.json says."""
        vocabulary, hidden = self.dimensions.vocabulary, self.dimensions.hidden
        shapes = [self._shape(name) for name in names.VOCABULARY_WEIGHTS]
        rows = [shape[0] for shape in shapes]
        if set(rows) == {vocabulary} or any(shape[1:] != (hidden,) for shape in shapes):
            return  # no fault, or another one, which is told with its tensor
        if len(set(rows)) == 1:
            next_step = f"set vocab_size to {rows[0]} in config.json, as resizing the embeddings should have done"
        else:
            next_step = "resize both with model.resize_token_embeddings, and save the model again"
        raise UserError(
            "wrong vocab_size",
            where=self.checkpoint.directory / "config.json",
            got=f"vocab_size={vocabulary}, but {rows[0]} rows of embeddings and {rows[1]} of the head",
            expected="the same number",
            next_step=next_step,
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor, 4-bit or not."""
        packed = Packed.find(self.checkpoint, name)
        return packed.state.shape if packed else require_tensor(self.checkpoint, name).shape

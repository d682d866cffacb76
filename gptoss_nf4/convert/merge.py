"""Merging an adapter into the weights that it was trained on: W + B @ A in float32, with the adapter's scale in B.

The sum does not lie on the grid of the 4-bit codes. So stage requant quantizes it again, which adds an error, and stage
normalize rounds the modules that are not 4-bit. Modules without a delta stay as they are.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.canonical import Delta
from gptoss_nf4.adapters.resolve import Module
from gptoss_nf4.convert.plan import Target
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.quant_state import MAX_ABSMAX


@dataclass(frozen=True)
class Merge:
    """What an adapter adds to a base with dimensions `d`, module by module. A tensor is read only when it is asked for."""

    adapter: Adapter
    d: Dimensions

    def recorded(self, name: str) -> dict:
        """What config.json says of the adapter, which the settings call `name`. The plugin knows it by its digest."""
        return {"name": name, "sha256": self.adapter.sha256()}

    @cached_property
    def _modules(self) -> dict[str, Module]:
        return {module.name: module for modules in self.adapter.modules(self.d).values() for module in modules}

    def delta(self, name: str) -> Delta | None:
        """The delta of q, k, v, o or router, by its full name. None where it adds nothing."""
        delta = self._delta(name)
        return delta if delta and _adds(delta) else None

    def deltas(self, target: Target) -> dict[str, Delta]:
        """The deltas of the modules that make `target`, by their names. Those that add nothing are left out."""
        if not target.fusion.stacked:
            return {part.name: delta for part in target.parts if (delta := self.delta(part.name))}
        stacked = self._delta(target.name)
        if stacked is None:
            return {}
        experts = (Delta(part.name, *ab) for part, *ab in zip(target.parts, stacked.a, stacked.b, strict=True))
        return {delta.name: delta for delta in experts if _adds(delta)}

    def _delta(self, name: str) -> Delta | None:
        return self.adapter.delta(self._modules[name]) if name in self._modules else None


def _adds(delta: Delta) -> bool:
    """Whether b @ a is not zero because of a factor of zeros: that of an expert which was not trained."""
    return bool(delta.a.any() and delta.b.any())


def merged(weight: torch.Tensor, delta: Delta) -> torch.Tensor:
    """`weight` + b @ a, float32 [rows, in_features] on the device of `weight`, which has any floating dtype.

    Nothing is rounded before the sum. UserError where it is beyond what may be served.
    """
    total = weight.float() + delta.b.to(weight.device) @ delta.a.to(weight.device)
    largest = float(total.abs().max())  # NaN if any is
    if not largest <= MAX_ABSMAX:
        raise UserError(
            "merged weight too large",
            where=delta.name,
            got=f"{largest:g}",
            expected=f"finite values up to {MAX_ABSMAX:g}",
            next_step="use a checkpoint of the adapter that was saved before training went wrong",
        )
    return total

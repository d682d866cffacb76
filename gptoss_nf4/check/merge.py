"""What merging an adapter did to the weights, and what quantizing them again lost of it: by layer and kind of module."""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from math import gcd

import numpy as np
import torch

from gptoss_nf4.adapters.canonical import Delta
from gptoss_nf4.check.proof import Comparison, by_layer, compare, result_parts
from gptoss_nf4.check.weights import source_weight, stored_weight
from gptoss_nf4.convert.merge import Merge
from gptoss_nf4.convert.plan import QuantizedTarget, RequantOptions, plan_layer
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.source.interface import Source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import Checkpoint

ROUTER = "mlp.router"
ROWS = 64  # at a time: a whole matrix in float64 does not fit a core's cache, and takes several times as long
ROUNDING = 1e-3  # of float32 sums, relative to the largest weight of a block


@dataclass
class Loss:
    """Sums over `weights` weights, in float64. W is the base's weight, D = B @ A the delta, S what is stored for W + D.

    The error is S - (W + D).
    """

    weights: int = 0
    squared_base: float = 0.0
    squared_delta: float = 0.0
    squared_merged: float = 0.0
    squared_error: float = 0.0
    along_delta: float = 0.0
    """Inner product of S - W and D."""
    largest_error: float = 0.0
    unexplained: int = 0
    """Weights whose error is more than rounding to the nearest code can be."""

    def __add__(self, other: "Loss") -> "Loss":
        largest = max(self.largest_error, other.largest_error)
        sums = {key: value + getattr(other, key) for key, value in vars(self).items()}
        return Loss(**sums | {"largest_error": largest})

    def as_dict(self) -> dict:
        """The figures of a report; None for a ratio to nothing.

        `error_by_delta` is the error's size divided by the delta's: at 1 as much is lost as by leaving the adapter out.
        `delta_kept` is how much of the delta the stored weights have along it: 1 is all, 0 nothing.
        """

        def root(dividend: float, divisor: float) -> float | None:
            return (dividend / divisor) ** 0.5 if divisor else None

        return {
            "weights": self.weights,
            "relative_delta": root(self.squared_delta, self.squared_base),
            "relative_rms_error": root(self.squared_error, self.squared_merged),
            "largest_error": self.largest_error,
            "error_by_delta": root(self.squared_error, self.squared_delta),
            "delta_kept": self.along_delta / self.squared_delta if self.squared_delta else None,
            "unexplained": self.unexplained,
        }


def loss_of(base: torch.Tensor, delta: Delta | None, stored: torch.Tensor, options: RequantOptions) -> Loss:
    """The `Loss` of one module. The weights `base` and `stored` are [rows, in_features] of any floating dtype."""
    a = base.new_zeros(1, base.shape[1]) if delta is None else delta.a
    b = base.new_zeros(len(base), 1) if delta is None else delta.b
    pieces = zip(base.split(ROWS), b.split(ROWS), stored.split(ROWS), strict=True)
    losses = (_loss_of_rows(w.double(), b.double() @ a.double(), s.double(), options) for w, b, s in pieces)
    return sum(losses, Loss())


def _loss_of_rows(base: torch.Tensor, added: torch.Tensor, stored: torch.Tensor, options: RequantOptions) -> Loss:
    """The `Loss` of some rows, all in float64."""
    change, merged = stored - base, base + added
    error = change - added
    # A block is scaled to its largest weight, and a code lies at most half of the codebook's largest gap away.
    half_gap = float(np.diff(np.sort(CODEBOOKS[options.quant_type])).max()) / 2 + ROUNDING
    blocks = (-1, gcd(options.blocksize, base.shape[1]))  # a dense weight may have rows that are not whole blocks
    explained = half_gap * merged.abs().reshape(blocks).amax(1, keepdim=True)
    return Loss(
        weights=base.numel(),
        squared_base=float(base.square().sum()),
        squared_delta=float(added.square().sum()),
        squared_merged=float(merged.square().sum()),
        squared_error=float(error.square().sum()),
        along_delta=float((change * added).sum()),
        largest_error=float(error.abs().max()),
        unexplained=int((error.abs().reshape(blocks) > explained).sum()),
    )


def compare_merged(
    source: Source, result: Checkpoint, merge: Merge, options: RequantOptions, dtype: str
) -> tuple[Comparison, dict]:
    """(how the modules that had to stay as they were compare with the source's, what was lost in the others).

    The second has the figures of `Loss`: `total`, a list `kinds` with an entry for each kind of module (q_proj, w13,
    router, ...), and a list `layers` with those of each layer by kind. `dvc metrics show` prints no lists, but the total.
    """
    changed = _changed(source, merge, options)
    kept = compare(source, result, options, dtype, leaving_out=changed)
    found = by_layer(partial(_losses, source, result, merge, options, changed), source)
    by_kind: dict[str, Loss] = {}
    for losses in found:
        for kind, loss in losses.items():
            by_kind[kind] = by_kind.get(kind, Loss()) + loss
    return kept, {
        "total": sum(by_kind.values(), Loss()).as_dict(),
        "kinds": [{"kind": kind, **loss.as_dict()} for kind, loss in by_kind.items()],
        "layers": [
            {"layer": layer} | {kind: loss.as_dict() for kind, loss in losses.items()} for layer, losses in enumerate(found)
        ],
    }


def _changed(source: Source, merge: Merge, options: RequantOptions) -> frozenset[str]:
    """Names of the modules that need not be the source's any more: those with a delta, or quantized in another format."""
    found: set[str] = set()
    for layer in range(source.dimensions.layers):
        router = names.prefix(layer) + ROUTER
        found |= {router} if merge.delta(router) else set()
        for target in plan_layer(source, layer, options):
            found |= merge.deltas(target).keys()
            if isinstance(target, QuantizedTarget):
                found |= {part.name for part in target.parts if not target.holds(part)}
    return frozenset(found)


def _losses(
    source: Source, result: Checkpoint, merge: Merge, options: RequantOptions, changed: Container[str], layer: int
) -> dict[str, Loss]:
    """The `Loss` of each kind of module in one layer. One module's weights are in memory at a time."""
    found: dict[str, Loss] = {}
    for target in plan_layer(source, layer, options):
        if not any(part.name in changed for part in target.parts):
            continue  # reads nothing of it
        deltas = merge.deltas(target)
        for part, stored in result_parts(result, target, options.w13_order, scale=1.0):
            if part.name in changed:
                kind = (target if target.fusion.stacked else part).name.rpartition(".")[2]
                loss = loss_of(source_weight(source, part), deltas.get(part.name), stored, options)
                found[kind] = found.get(kind, Loss()) + loss
    router = names.prefix(layer) + ROUTER
    if delta := merge.delta(router):
        weight = f"{router}.weight"
        found["router"] = loss_of(source.floating(weight).tensor(), delta, stored_weight(result, weight), options)
    return found


def require_merged(lost: dict, artifacts: Artifacts) -> None:
    """UserError where `compare_merged` found a weight that is not the merged one, quantized."""
    wrong = [f"{each['unexplained']} weights of {each['kind']}" for each in lost["kinds"] if each["unexplained"]]
    if wrong:
        raise UserError(
            "the result is not the merged weights",
            where=artifacts.checkpoint,
            got=f"{', '.join(wrong)} that rounding does not explain",
            expected="base and adapter, added and quantized",
            next_step="run `dvc repro -f prove`; if it stays, report it",
        )

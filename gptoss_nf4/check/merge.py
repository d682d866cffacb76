"""What merging an adapter did to the weights, and what quantizing them again lost of it: by layer and kind of module.

The proof leaves these weights to this check. They must be what is stored for the sum of base and adapter: the nearest code,
or the sum rounded to the checkpoint's dtype.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from gptoss_nf4.adapters.canonical import Delta
from gptoss_nf4.check.weights import source_weight, stored_state, stored_weight
from gptoss_nf4.convert.merge import Merge
from gptoss_nf4.convert.plan import QuantizedTarget, RequantOptions, Target, plan_layer
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.bnb import dequantize_float32
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.format.rows import INTERLEAVED, interleaved_rows
from gptoss_nf4.source.interface import Module, Source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.machine import cores

ROUTER = "mlp.router"
ROWS = 64  # at a time: a whole matrix in float64 does not fit a core's cache, and takes several times as long
ROUNDING = 1e-4  # of float32 sums, relative to the largest weight and delta of a row
# float64 weights [rows, in_features] -> what is stored for them, in float64 too
Stored = Callable[[torch.Tensor], torch.Tensor]
T = TypeVar("T")


def changed_weights(source: Source, merge: Merge, options: RequantOptions) -> frozenset[tuple[str, int]]:
    """(tensor of the result, number of the source's matrix in it) of every weight that the adapter changes."""
    found: set[tuple[str, int]] = set()
    for layer in range(source.dimensions.layers):
        router = names.prefix(layer) + ROUTER
        found |= {(f"{router}.weight", 0)} if merge.delta(router) else set()
        for target in plan_layer(source, layer, options):
            deltas = merge.deltas(target)
            found |= {(target.weight, number) for number, part in enumerate(target.parts) if part.name in deltas}
    return frozenset(found)


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
    """Weights that are further from the sum than what is to be stored for it."""

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


def loss_of(base: torch.Tensor, delta: Delta | None, stored: torch.Tensor, rounded: Stored) -> Loss:
    """The `Loss` of one module. The weights `base` and `stored` are [rows, in_features] of any floating dtype."""
    a = base.new_zeros(1, base.shape[1]) if delta is None else delta.a
    b = base.new_zeros(len(base), 1) if delta is None else delta.b
    pieces = zip(base.split(ROWS), b.split(ROWS), stored.split(ROWS), strict=True)
    losses = (_loss_of_rows(w.double(), b.double() @ a.double(), s.double(), rounded) for w, b, s in pieces)
    return sum(losses, Loss())


def _loss_of_rows(base: torch.Tensor, added: torch.Tensor, stored: torch.Tensor, rounded: Stored) -> Loss:
    """The `Loss` of some rows, all in float64."""
    change, merged = stored - base, base + added
    error = change - added
    explained = (rounded(merged) - merged).abs() + ROUNDING * (base.abs() + added.abs()).amax(1, keepdim=True)
    return Loss(
        weights=base.numel(),
        squared_base=float(base.square().sum()),
        squared_delta=float(added.square().sum()),
        squared_merged=float(merged.square().sum()),
        squared_error=float(error.square().sum()),
        along_delta=float((change * added).sum()),
        largest_error=float(error.abs().nan_to_num(nan=torch.inf).max()),
        unexplained=int((~(error.abs() <= explained)).sum()),  # NaN is not explained
    )


def nearest_codes(weights: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """`weights` as 4 bit hold them at best: a block is scaled to its largest weight. Rows are whole blocks."""
    codes = torch.from_numpy(np.sort(CODEBOOKS[quant_type])).double()
    blocks = weights.reshape(-1, blocksize)
    largest = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / largest.where(largest > 0, 1)
    return (codes[torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)] * largest).view(weights.shape)


def _in_dtype(weights: torch.Tensor, dtype: str) -> torch.Tensor:
    return weights.to(getattr(torch, dtype)).double()


def losses(source: Source, result: Checkpoint, merge: Merge, options: RequantOptions, dtype: str) -> dict:
    """What was lost in the modules with a delta, and in those that were quantized again since their format is another.

    Has the figures of `Loss`: `total`, a list `kinds` with an entry for each kind of module (q_proj, w13, router, ...), and
    a list `layers` with those of each layer by kind. `dvc metrics show` prints no lists, but the total. `dtype` is that of
    what the result holds dense.
    """
    found = _by_layer(partial(_losses, source, result, merge, options, dtype), source)
    by_kind: dict[str, Loss] = {}
    for layer_losses in found:
        for kind, loss in layer_losses.items():
            by_kind[kind] = by_kind.get(kind, Loss()) + loss
    return {
        "total": sum(by_kind.values(), Loss()).as_dict(),
        "kinds": [{"kind": kind, **loss.as_dict()} for kind, loss in by_kind.items()],
        "layers": [
            {"layer": layer} | {kind: loss.as_dict() for kind, loss in each.items()} for layer, each in enumerate(found)
        ],
    }


def _by_layer(work: Callable[[int], T], source: Source) -> list[T]:
    """`work` of each layer, on all cores. It and its result have to be picklable."""
    workers = min(cores(), source.dimensions.layers)
    few = source.dimensions.layers * source.dimensions.experts < 256  # done before workers would have started
    if workers == 1 or few:
        return [work(layer) for layer in range(source.dimensions.layers)]
    # spawn: a fork of a process with torch's threads can hang.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(work, range(source.dimensions.layers)))


def _losses(
    source: Source, result: Checkpoint, merge: Merge, options: RequantOptions, dtype: str, layer: int
) -> dict[str, Loss]:
    """The `Loss` of each kind of module in one layer. One module's weights are in memory at a time."""
    found: dict[str, Loss] = {}
    in_dtype = partial(_in_dtype, dtype=dtype)
    for target in plan_layer(source, layer, options):
        deltas, rounded, again = merge.deltas(target), in_dtype, set()
        if isinstance(target, QuantizedTarget):
            rounded = partial(nearest_codes, quant_type=target.quant_type, blocksize=target.blocksize)
            again = {part.name for part in target.parts if not target.holds(part)}
        changed = deltas.keys() | again
        if not changed:
            continue  # reads nothing of it
        for part, stored in _result_parts(result, target, options.w13_order):
            if part.name in changed:
                kind = (target if target.fusion.stacked else part).name.rpartition(".")[2]
                loss = loss_of(source_weight(source, part), deltas.get(part.name), stored, rounded)
                found[kind] = found.get(kind, Loss()) + loss
    router = names.prefix(layer) + ROUTER
    if delta := merge.delta(router):
        weight = f"{router}.weight"
        found["router"] = loss_of(source.floating(weight).tensor(), delta, stored_weight(result, weight), in_dtype)
    return found


def _result_parts(result: Checkpoint, target: Target, w13_order: str) -> Iterator[tuple[Module, torch.Tensor]]:
    """(source module, the result's weight of it, float32 [rows, in_features], rows in the source's order).

    Experts are read one at a time, so this needs the memory of one.
    """
    if not target.fusion.stacked:
        rows = [part.shape[0] for part in target.parts]
        yield from zip(target.parts, stored_weight(result, target.weight).split(rows), strict=True)
        return
    state = stored_state(result, target.weight)
    absmax = state.absmax
    reorder = target.fusion == names.W13 and w13_order != INTERLEAVED
    order = torch.from_numpy(interleaved_rows(w13_order, target.shape[1])) if reorder else slice(None)
    for number, part in enumerate(target.parts):
        state.absmax, state.shape = absmax[number].contiguous(), torch.Size(part.shape)
        yield part, dequantize_float32(result.torch_row(target.weight, number), state)[order]


def require_merged(lost: dict, result: Path) -> None:
    """UserError where `losses` found a weight that is not what is to be stored for base and adapter."""
    wrong = [f"{each['unexplained']} weights of {each['kind']}" for each in lost["kinds"] if each["unexplained"]]
    if wrong:
        raise UserError(
            "the result is not the merged weights",
            where=result,
            got=f"{', '.join(wrong)} that rounding does not explain",
            expected="base and adapter, added and quantized",
            next_step="run `dvc repro -f prove`; if it stays, report it",
        )

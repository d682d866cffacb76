"""The proof of exactness: each weight as bitsandbytes dequantizes it from the source, and from the result."""

import multiprocessing
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from gptoss_nf4.check.weights import source_weight, stored_state, stored_weight
from gptoss_nf4.convert.plan import EXACT, DenseTarget, RequantOptions, Target, plan_layer
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.bnb import dequantize_float32
from gptoss_nf4.format.cast import cast
from gptoss_nf4.format.residual import scale_of, writes_to_stream
from gptoss_nf4.format.rows import INTERLEAVED, interleaved_rows
from gptoss_nf4.source.interface import Module, Source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.machine import cores

T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """Number of weights compared, number of those that differ, and their largest difference."""

    compared: int = 0
    different: int = 0
    largest_difference: float = 0.0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.compared + other.compared,
            self.different + other.different,
            max(self.largest_difference, other.largest_difference),
        )


def compare(
    source: Source, result: Checkpoint, options: RequantOptions, dtype: str, leaving_out: Container[str] = frozenset()
) -> Comparison:
    """Compare every weight of attention and experts, 4-bit or dense, on all cores, but those of modules `leaving_out`.

    The source's weight is rounded to `dtype` where the result's is dense: a module left in 16 bit, or q, k and v of which
    not all are 4-bit. 4-bit weights that write to the residual stream are compared as they are served, times the recorded
    residual_scale. On the result's side absmax is multiplied by it, as in the plugin; on the source's side the weight is.
    """
    scale = scale_of(result.config["quantization_config"], result.directory / "config.json")
    work = partial(_compare_layer, source, result, options, dtype, scale, leaving_out)
    return sum(by_layer(work, source), Comparison())


def by_layer(work: Callable[[int], T], source: Source) -> list[T]:
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


def _compare_layer(
    source: Source,
    result: Checkpoint,
    options: RequantOptions,
    dtype: str,
    residual_scale: float,
    leaving_out: Container[str],
    layer: int,
) -> Comparison:
    total = Comparison()
    for target in plan_layer(source, layer, options):
        dense = isinstance(target, DenseTarget)
        scale = residual_scale if not dense and writes_to_stream(target.weight) else 1.0
        for part, after in result_parts(result, target, options.w13_order, scale):
            if part.name in leaving_out:
                continue
            before = source_weight(source, part)
            if dense:
                before = cast(before, getattr(torch, dtype))[0].float()
            if scale != 1:
                before *= scale
            if torch.equal(before, after):
                total += Comparison(before.numel())
            else:
                unequal = before != after
                total += Comparison(before.numel(), int(unequal.sum()), float((before - after).abs().max()))
    return total


def result_parts(result: Checkpoint, target: Target, w13_order: str, scale: float) -> Iterator[tuple[Module, torch.Tensor]]:
    """(source module, the result's weight of it, float32 [rows, in_features], rows in the source's order).

    Experts are read one at a time, so this needs the memory of one.
    """
    if not target.fusion.stacked:
        rows = [part.shape[0] for part in target.parts]
        whole = stored_weight(result, target.weight, scale)
        yield from zip(target.parts, whole.split(rows), strict=True)
        return
    state = stored_state(result, target.weight, scale)
    absmax = state.absmax
    reorder = target.fusion == names.W13 and w13_order != INTERLEAVED
    order = torch.from_numpy(interleaved_rows(w13_order, target.shape[1])) if reorder else slice(None)
    for number, part in enumerate(target.parts):
        state.absmax, state.shape = absmax[number].contiguous(), torch.Size(part.shape)
        yield part, dequantize_float32(result.torch_row(target.weight, number), state)[order]


def require_exact(result: Comparison, options: RequantOptions, artifacts: Artifacts) -> None:
    """UserError where a weight changed in mode exact, or in a module that merging had to leave as it was."""
    if (options.mode == EXACT or options.merge) and result.different:
        raise UserError(
            "the result is not exact",
            where=artifacts.checkpoint,
            got=f"{result.different} weights that differ from the source's",
            expected="no such weight",
            next_step="run `dvc repro -f prove`; if it stays, report it",
        )

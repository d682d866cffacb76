"""The proof of exactness: what bitsandbytes reads from the source against what it reads from the result."""

from collections.abc import Iterator

import torch
from bitsandbytes.functional import QuantState

from gptoss_nf4.bnb import dequantize_float32
from gptoss_nf4.checkpoint import Checkpoint
from gptoss_nf4.dtypes import cast
from gptoss_nf4.fuse import interleaved_rows
from gptoss_nf4.plan import RequantOptions, Target, plan_layer
from gptoss_nf4.source import Module, SplitSource


def read_state(checkpoint: Checkpoint, weight: str) -> QuantState:
    """bitsandbytes' own QuantState of `weight`, read by its `from_dict`."""
    sidecars = {name: checkpoint.torch(name) for name in checkpoint.tensors if name.startswith(f"{weight}.")}
    return QuantState.from_dict(sidecars, device=torch.device("cpu"))


def source_weight(checkpoint: Checkpoint, weight: str) -> torch.Tensor:
    """A source weight in float32 [rows, in_features], dequantized by bitsandbytes where it is 4-bit."""
    if f"{weight}.absmax" not in checkpoint.tensors:
        return checkpoint.torch(weight).float()
    return dequantize_float32(checkpoint.torch(weight), read_state(checkpoint, weight))


def compare(source: SplitSource, result: Checkpoint, options: RequantOptions, dtype: str) -> dict:
    """Compare every weight of attention and experts, 4-bit or carried dense; the counts are of single weights.

    What is served dense (a module left in 16 bit, or q, k and v that differ) is compared after rounding to `dtype`.
    """
    compared = different = 0
    largest = 0.0
    for layer in range(source.dimensions.layers):
        for target in plan_layer(source, layer, options):
            for part, after in _result_parts(result, target, options.w13_order):
                before = source_weight(source.checkpoint, part.weight)
                if not target.quantized:
                    before = cast(before, getattr(torch, dtype))[0].float()
                unequal = before != after
                compared += before.numel()
                different += int(unequal.sum())
                if unequal.any():
                    largest = max(largest, float((before - after).abs().max()))
    return {"compared": compared, "different": different, "largest_difference": largest}


def _result_parts(result: Checkpoint, target: Target, w13_order: str) -> Iterator[tuple[Module, torch.Tensor]]:
    """(source module, its weight read from the result in float32, rows in the source's order).

    Experts are read one at a time, so that the memory needed is one expert's.
    """
    weight = f"{target.name}.weight"
    if not target.fusion.stacked:
        rows = [part.shape[0] for part in target.parts]
        whole = source_weight(result, weight)
        yield from zip(target.parts, whole.split(rows), strict=True)
        return
    codes, state = result.torch(weight), read_state(result, weight)
    absmax = state.absmax
    for number, part in enumerate(target.parts):
        state.absmax, state.shape = absmax[number].contiguous(), torch.Size(part.shape)
        values = dequantize_float32(codes[number].contiguous(), state)
        yield part, values[torch.from_numpy(interleaved_rows(w13_order, len(values)))] if target.is_w13 else values

"""The proof of exactness: what bitsandbytes reads from the source against what it reads from the result."""

from collections.abc import Iterator

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit

from gptoss_nf4 import names
from gptoss_nf4.checkpoint import Checkpoint
from gptoss_nf4.dtypes import cast
from gptoss_nf4.fuse import interleaved_rows
from gptoss_nf4.plan import RequantOptions, Target, plan_layer
from gptoss_nf4.source import Module, SplitSource


def read_state(checkpoint: Checkpoint, weight: str) -> QuantState:
    """bitsandbytes' own QuantState of `weight`, made to dequantize to float32 (it would round to the state's dtype)."""
    sidecars = {name: checkpoint.torch(name) for name in checkpoint.tensors if name.startswith(f"{weight}.")}
    state = QuantState.from_dict(sidecars, device=torch.device("cpu"))
    state.dtype = torch.float32
    return state


def source_weight(checkpoint: Checkpoint, weight: str) -> torch.Tensor:
    """A source weight in float32 [rows, in_features], dequantized by bitsandbytes where it is 4-bit."""
    if f"{weight}.absmax" not in checkpoint.tensors:
        return checkpoint.torch(weight).float()
    return dequantize_4bit(checkpoint.torch(weight), read_state(checkpoint, weight))


def compare(source: SplitSource, result: Checkpoint, options: RequantOptions, dtype: str) -> dict:
    """Compare every weight that is 4-bit in the source or the result; the counts are of single weights.

    A 4-bit module that is served dense (q, k and v that differ) is compared after rounding to `dtype`, as served.
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
        values = dequantize_4bit(codes[number].contiguous(), state)
        yield part, values[torch.from_numpy(interleaved_rows(w13_order, len(values)))] if target.is_w13 else values


def quantized_weights(checkpoint: Checkpoint) -> list[str]:
    """Names of all 4-bit weights of a checkpoint in either layout."""
    marker = f".{names.STATE_PREFIX}"
    return sorted(name.split(marker)[0] for name in checkpoint.tensors if marker in name)

"""Making the fused 4-bit tensors of one layer, exactly or by quantizing again."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gptoss_nf4.convert.plan import EXACT, RequantOptions, Target
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.format.rows import INTERLEAVED, rows_of_blocks, w13_rows
from gptoss_nf4.source.split import Module, SplitSource
from gptoss_nf4.storage.tensor_writer import Stream, whole


@dataclass
class AddedError:
    """What quantizing again changed, summed over weights in float64."""

    weights: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0
    largest: float = 0.0

    def add(self, before, after) -> None:
        """`before` and `after`: float32 tensors of one shape."""
        difference = (after - before).double()
        self.weights += before.numel()
        self.squared_error += float(difference.square().sum())
        self.squared_weight += float(before.double().square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))

    def as_dict(self) -> dict:
        relative = (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else 0.0
        return {"weights": self.weights, "relative_rms_error": relative, "largest_error": self.largest}


def requant_layer(
    source: SplitSource, absmax: dict[str, np.ndarray], targets: list[Target], options: RequantOptions, device: str
) -> tuple[list[Stream], dict[str, AddedError]]:
    """The 4-bit tensors of a layer, made expert by expert while they are written.

    Args:
        absmax: de-nested float32 absmax by source weight name (stage dequant).
        device: torch device for mode nf4; mode exact needs neither torch nor a device.

    Returns:
        `<target>.weight` uint8 [..., rows, in/2], `.absmax` float32 [..., rows, in/blocksize], `.quant_map` float32
        [16] for each quantized target; and in mode nf4 what quantizing again changed by target, filled by writing.
    """
    streams: list[Stream] = []
    errors: dict[str, AddedError] = {}
    for target in targets:
        if not target.quantized:
            continue
        if options.mode == EXACT:
            parts = _moved(source, absmax, target)
        else:
            parts = _requantized(source, absmax, target, device, errors.setdefault(target.name, AddedError()))
        streams += _fused(target, parts, options.w13_order)
    return streams, errors


def _fused(target: Target, parts: Iterator[tuple[np.ndarray, np.ndarray]], w13_order: str) -> list[Stream]:
    """Codes part by part, then the absmax that came with them: an eighth of the codes' size, kept until then."""
    scales: list[np.ndarray] = []

    def codes() -> Iterator[np.ndarray]:
        for packed, absmax in parts:
            order = w13_rows(w13_order, len(packed)) if target.is_w13 and w13_order != INTERLEAVED else slice(None)
            scales.append(absmax[order])
            yield packed[order]

    weight, (*rows, columns) = f"{target.name}.weight", target.shape
    return [
        Stream(weight, "U8", (*rows, columns // 2), codes()),
        Stream(f"{weight}.absmax", "F32", (*rows, columns // target.blocksize), scales),
        whole(f"{weight}.quant_map", "F32", CODEBOOKS[target.quant_type]),
    ]


def _moved(source: SplitSource, absmax: dict[str, np.ndarray], target: Target) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in target.parts:
        yield rows_of_blocks(source.packed(part), absmax[part.weight], part.shape)


def _requantized(
    source: SplitSource, absmax: dict[str, np.ndarray], target: Target, device: str, error: AddedError
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Dequantize and quantize again with bitsandbytes, one module at a time; `error` gathers what that changed."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for part in target.parts:
        before = dense_weight(source, part, absmax.get(part.weight), device)
        packed, state = quantize_4bit(before, blocksize=target.blocksize, quant_type=target.quant_type)
        error.add(before, dequantize_4bit(packed, state))
        yield rows_of_blocks(packed.cpu().numpy(), state.absmax.float().cpu().numpy(), part.shape)


def dense_weight(source: SplitSource, part: Module, absmax: np.ndarray | None, device: str):
    """The weight of one module as float32 tensor [rows, in_features] on `device`.

    `absmax`: float32, de-nested; None for a module that the source left dense.
    """
    import torch
    from bitsandbytes.functional import QuantState

    from gptoss_nf4.format.bnb import dequantize_float32

    if part.state is None:
        return source.checkpoint.torch(part.weight).to(device, torch.float32)
    state = QuantState(
        absmax=torch.from_numpy(absmax).to(device),
        shape=torch.Size(part.shape),
        dtype=torch.float32,
        blocksize=part.state.blocksize,
        quant_type=part.state.quant_type,
    )
    return dequantize_float32(source.checkpoint.torch(part.weight).to(device), state)

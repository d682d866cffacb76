"""Stage requant: making one layer's fused 4-bit tensors, by moving rows or by quantizing again.

Mode exact imports no torch: it would cost seconds in each of the 24 or 36 runs of this stage.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.convert.plan import EXACT, DenseTarget, QuantizedTarget, RequantOptions, Target, plan_layer
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import INPUTS, OUTPUTS, absmax_shape, rows_of_outputs
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.format.quant_state import MAX_ABSMAX
from gptoss_nf4.format.rows import rows_of_blocks
from gptoss_nf4.source.interface import Module, Source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.tensor_reader import read_array, read_header
from gptoss_nf4.storage.tensor_writer import Declared, writing_tensors
from gptoss_nf4.storage.writing import write_json

if TYPE_CHECKING:
    import torch

    from gptoss_nf4.adapters.canonical import Delta
    from gptoss_nf4.convert.merge import Merge

# Rows of one module: codes uint8 [rows, in_features / 2] and absmax float32, both as `format/blocks.py` has them.
Rows = tuple[np.ndarray, np.ndarray]
ROWS = 64  # at a time: a whole matrix in float64 does not fit a core's cache
# What happens to a module of the source.
MOVED, QUANTIZED, MERGED = "moved", "quantized again", "merged and quantized again"


@dataclass
class AddedError:
    """What quantizing again changed. `squared_error` and `squared_weight` are sums over `weights` weights, in float64."""

    weights: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0
    largest: float = 0.0

    def add(self, before: "torch.Tensor", after: "torch.Tensor") -> None:
        """Count the weights `before` and `after` quantizing again: float32 [rows, in_features]."""
        self.weights += before.numel()
        for weight, rows in zip(before.split(ROWS), after.split(ROWS), strict=True):
            difference = (rows - weight).double()
            self.squared_error += float(difference.square().sum())
            self.squared_weight += float(weight.double().square().sum())
            self.largest = max(self.largest, float(difference.abs().max()))

    def as_dict(self) -> dict:
        relative = (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else 0.0
        return {"weights": self.weights, "relative_rms_error": relative, "largest_error": self.largest}


def requant(
    source: Source,
    artifacts: Artifacts,
    layer: int,
    options: RequantOptions,
    device: str,
    merge: "Merge | None" = None,
) -> int:
    """Write the layer's fused 4-bit tensors and its report, and return the size of the tensors' file in bytes.

    Each quantized target has three tensors: `<target>.weight` uint8 [..., rows, in / 2], its `.absmax` float32
    [..., rows, in / blocksize], or [..., rows / blocksize, in] where blocks run along the outputs, and its `.quant_map`
    float32 [16]. The codes are written expert by expert. Meanwhile absmax
    stays in memory: with a blocksize of 64 it has an eighth of the codes' size. `device` is torch's, for mode nf4.

    With `merge`, deltas are added before quantizing. Modules without one are moved if their format is the target's.
    """
    targets = plan_layer(source, layer, options)
    quantized = [target for target in targets if isinstance(target, QuantizedTarget)]
    absmax = _read_absmax(artifacts, layer)
    errors: dict[str, AddedError] = {}
    spread: dict[str, dict] = {}
    handled: dict[str, list[str]] = {}
    declared = [tensor for target in quantized for tensor in _declared(target)]
    with writing_tensors(artifacts.layer_weights(layer), declared) as out:
        for target in quantized:
            order = target.row_order(options.w13_order)
            scales = []
            deltas = merge.deltas(target) if merge else {}
            for part in target.parts:
                handling = _handling(part, target, options, deltas)
                handled.setdefault(handling, []).append(part.name)
                if handling == MOVED:
                    to_rows = rows_of_outputs if part.blocks_along == OUTPUTS else rows_of_blocks
                    codes, scale = to_rows(source.codes(part), absmax[part.weight], part.shape)
                else:
                    error = errors.setdefault(target.name, AddedError())
                    weight = _float32_weight(source, part, absmax.get(part.weight), device, deltas.get(part.name))
                    codes, scale = _quantized(weight, target, error)
                out.append(target.weight, codes[order])
                scales.append(scale[order])
            out.append(f"{target.weight}.absmax", *scales)
            spread[target.name] = _spread(scales)
            out.append(f"{target.weight}.quant_map", CODEBOOKS[target.quant_type])
    source.forget(layer)
    report: dict = {"layer": layer, "mode": options.mode}
    if options.merge:
        report |= {"merge": options.merge, "modules": handled}
    report["targets"] = {
        target.name: _describe(target, errors.get(target.name), spread.get(target.name)) for target in targets
    }
    write_json(artifacts.report(layer), report)
    return out.size


def _read_absmax(artifacts: Artifacts, layer: int) -> dict[str, np.ndarray]:
    """The absmax that stage dequant wrote: float32 [blocks], by the canonical name of the weight."""
    stored = read_header(artifacts.require(artifacts.absmax(layer), f"dequant@{layer}"))
    return {name: read_array(info) for name, info in stored.items()}


def _declared(target: QuantizedTarget) -> list[Declared]:
    *rows, columns = target.shape
    absmax = absmax_shape(target.shape, target.blocksize, target.blocks_along)
    return [
        Declared(target.weight, "U8", (*rows, columns // 2)),
        Declared(f"{target.weight}.absmax", "F32", absmax),
        Declared(f"{target.weight}.quant_map", "F32", CODEBOOKS[target.quant_type].shape),
    ]


def _handling(part: Module, target: QuantizedTarget, options: RequantOptions, deltas: "dict[str, Delta]") -> str:
    """What happens to `part`. In a merge, a module without a delta is quantized again only where it has to be."""
    if part.name in deltas:
        return MERGED
    return MOVED if options.mode == EXACT or (options.merge and target.holds(part)) else QUANTIZED


def _quantized(weight: "torch.Tensor", target: QuantizedTarget, error: AddedError) -> Rows:
    """`weight`, float32 [rows, in_features], quantized by bitsandbytes as `target` asks. The difference goes to `error`."""
    from gptoss_nf4.eager_bnb import bnb

    packed, state = bnb.quantize_4bit(weight, blocksize=target.blocksize, quant_type=target.quant_type)
    error.add(weight, bnb.dequantize_4bit(packed, state))
    return rows_of_blocks(packed.cpu().numpy(), state.absmax.float().cpu().numpy(), weight.shape)


def _float32_weight(
    source: Source, part: Module, absmax: np.ndarray | None, device: str, delta: "Delta | None"
) -> "torch.Tensor":
    """The weight of one module, plus `delta` if it has one: float32 [rows, in_features] on `device`.

    `absmax` is float32 [blocks], after undoing double quantization; None for a module that the source left dense.
    """
    import torch

    from gptoss_nf4.convert.merge import merged
    from gptoss_nf4.eager_bnb import bnb
    from gptoss_nf4.format.bnb import dequantize_float32

    if part.state is None:
        weight = source.floating(part.weight).tensor().to(device, torch.float32)
        if not weight.abs().max() <= MAX_ABSMAX:  # nor if any is NaN
            raise UserError(
                "weights that cannot be quantized",
                where=part.weight,
                got="NaN, infinity or a weight beyond float16's range",
                expected=f"finite weights up to {MAX_ABSMAX:g}",
                next_step="repair the source",
            )
    else:
        state = bnb.QuantState(
            absmax=torch.from_numpy(absmax).to(device),
            shape=torch.Size(part.state.shape),
            dtype=torch.float32,
            blocksize=part.state.blocksize,
            quant_type=part.state.quant_type,
        )
        weight = dequantize_float32(torch.from_numpy(source.codes(part)).to(device), state)
        weight = weight if part.blocks_along == INPUTS else weight.T.contiguous()
    return merged(weight, delta) if delta else weight


def _spread(scales: list[np.ndarray]) -> dict:
    """Smallest, mean and largest absmax of a module, whose parts have the float32 arrays `scales`. Means in float64."""
    blocks = sum(scale.size for scale in scales)
    return {
        "smallest": min(float(scale.min()) for scale in scales),
        "mean": sum(float(scale.sum(dtype=np.float64)) for scale in scales) / blocks,
        "largest": max(float(scale.max()) for scale in scales),
    }


def _describe(target: Target, error: AddedError | None, absmax: dict | None) -> dict:
    described: dict = {"shape": target.shape, "quant_type": None, "blocksize": None}
    if isinstance(target, QuantizedTarget):
        described |= {"quant_type": target.quant_type, "blocksize": target.blocksize, "blocks_along": target.blocks_along}
        described["absmax"] = absmax
    if isinstance(target, DenseTarget):
        described["joined_dense"] = target.joined
    return described | ({"added_error": error.as_dict()} if error else {})

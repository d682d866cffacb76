"""Bringing every floating tensor to one dtype, counting what that loses."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from gptoss_nf4.convert.plan import RequantOptions, Target, plan_layer
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names, residual
from gptoss_nf4.format.cast import CastCounts, cast
from gptoss_nf4.format.dtypes import SAFETENSORS_NAMES, check_dtype
from gptoss_nf4.format.rows import w13_rows
from gptoss_nf4.source.split import SplitSource
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.tensor_writer import Stream, whole, write_tensors


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the result that is not 4-bit: the source tensors it comes from, and its values in pieces."""

    name: str
    origins: list[str]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]


def normalize(
    source: SplitSource, artifacts: Artifacts, options: RequantOptions, dtype: str, residual_scale: object = residual.AUTO
) -> dict:
    """Write every tensor that is not 4-bit in `dtype`, and the quantization states with it; returns the report.

    Raises a UserError that names the tensor where a value overflows or is not finite, or where `residual_scale`, which
    the plugin will apply, would lose too much; nothing is left written then.
    """
    scale = residual.resolve(residual_scale, dtype)
    stored = SAFETENSORS_NAMES[check_dtype(dtype)]
    counts: dict[str, CastCounts] = {}
    losses: dict[str, residual.ScalingLoss] = {}
    dense = list(dense_tensors(source, options))
    streams = [Stream(each.name, stored, each.shape, _cast(source, each, dtype, scale, counts, losses)) for each in dense]
    joined_dense = []
    for layer in range(source.dimensions.layers):
        for target in plan_layer(source, layer, options):
            if target.quantized:
                state = target.state(dtype).to_json()
                streams.append(whole(f"{target.name}.weight.{names.STATE_PREFIX}{target.quant_type}", "U8", state))
            elif target.joined_dense:
                joined_dense.append(target.name)
    write_tensors(artifacts.dense_weights, streams)
    origins = Counter(source.checkpoint.tensors[origin].dtype for each in dense for origin in each.origins)
    return {
        "dtype": dtype,
        "source_dtypes": dict(sorted(origins.items())),
        **asdict(sum(counts.values(), CastCounts())),
        "underflow_by_tensor": {
            name: {"values": c.values, "underflow": c.underflow} for name, c in counts.items() if c.underflow
        },
        "joined_dense": joined_dense,
        "scaling": residual.report(losses, scale),
    }


def _cast(
    source: SplitSource,
    tensor: DenseTensor,
    dtype: str,
    scale: float,
    counts: dict[str, CastCounts],
    losses: dict[str, residual.ScalingLoss],
) -> Iterator[np.ndarray]:
    """The bytes of `tensor` in `dtype`, piece by piece; fills `counts[tensor.name]`, and `losses` where it is scaled."""
    total, lost_by_scaling = CastCounts(), residual.ScalingLoss()
    scaled = scale != 1 and residual.writes_to_stream(tensor.name)
    for piece in tensor.pieces():
        values, lost = cast(piece, getattr(torch, dtype))
        if lost.overflow or lost.non_finite:
            kind = "overflow" if lost.overflow else "values that are not finite"
            raise UserError(
                f"{kind} in {dtype}",
                where=_culprit(source, tensor.origins, getattr(torch, dtype)) or tensor.name,
                got=f"{lost.overflow or lost.non_finite} of {lost.values}",
                expected="none",
                next_step="use dtype=bfloat16 or dtype=float32" if lost.overflow else "repair the source",
            )
        total += lost
        if scaled:
            lost_by_scaling += residual.scaling_loss(values, scale)
        yield values.contiguous().view(-1).view(torch.uint8).numpy()
    counts[tensor.name] = total
    if scaled:
        losses[tensor.name] = residual.require_small(lost_by_scaling, tensor.name, scale)


def _culprit(source: SplitSource, origins: list[str], dtype: torch.dtype) -> str | None:
    """The first of the source tensors that does not fit `dtype`; None where it is a 4-bit one."""
    for origin in origins:
        if source.checkpoint.tensors[origin].floating:
            for piece in source.checkpoint.torch_pieces(origin):
                _, counts = cast(piece, dtype)
                if counts.overflow or counts.non_finite:
                    return origin
    return None


def dense_tensors(source: SplitSource, options: RequantOptions) -> Iterator[DenseTensor]:
    """Everything of the result that is not 4-bit."""
    checkpoint, dimensions = source.checkpoint, source.dimensions

    def kept(old: str, new: str) -> DenseTensor:
        return DenseTensor(new, [old], checkpoint.tensors[old].shape, lambda: checkpoint.torch_pieces(old))

    for name in names.OUTSIDE_LAYERS:
        yield kept(name, name)
    for layer in range(dimensions.layers):
        for old, new in names.RENAMED.items():
            yield kept(names.prefix(layer) + old, names.prefix(layer) + new)
        for target in plan_layer(source, layer, options):
            yield DenseTensor(
                f"{target.name}.bias",
                [f"{part.name}.bias" for part in target.parts],
                target.shape[:-1],
                lambda target=target: iter([_fused_bias(source, target, options.w13_order)]),
            )
            if not target.quantized:
                yield DenseTensor(
                    f"{target.name}.weight",
                    [part.weight for part in target.parts],
                    target.shape,
                    lambda target=target: iter([_joined_weight(source, target)]),
                )


def _fused_bias(source: SplitSource, target: Target, w13_order: str) -> torch.Tensor:
    """[experts, rows] where experts are stacked, else [rows]; parts stored in several dtypes meet in float32."""
    biases = _one_dtype([source.checkpoint.torch(f"{part.name}.bias") for part in target.parts])
    if not target.fusion.stacked:
        return torch.cat(biases)
    stacked = torch.stack(biases)
    return stacked[:, torch.from_numpy(w13_rows(w13_order, stacked.shape[1]))] if target.is_w13 else stacked


def _joined_weight(source: SplitSource, target: Target) -> torch.Tensor:
    """[rows, in_features]: dense parts as stored, 4-bit parts dequantized to float32."""
    return torch.cat(
        _one_dtype(
            [
                torch.from_numpy(source.dequantized(part)) if part.state else source.checkpoint.torch(part.weight)
                for part in target.parts
            ]
        )
    )


def _one_dtype(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return parts if len({part.dtype for part in parts}) == 1 else [part.float() for part in parts]

"""Stage normalize: bringing every tensor that is not 4-bit to one dtype, and counting what that loses."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gptoss_nf4.convert.merge import Merge, merged
from gptoss_nf4.convert.plan import DenseTarget, QuantizedTarget, RequantOptions, Target, plan_layer
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names, residual
from gptoss_nf4.format.cast import CastCounts, cast
from gptoss_nf4.format.dtypes import SAFETENSORS_NAMES, check_dtype
from gptoss_nf4.format.residual import ScalingLoss
from gptoss_nf4.source.interface import Floating, Source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.machine import require_disk
from gptoss_nf4.storage.tensor_writer import Declared, TensorWriter, writing_tensors


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of the result that is not 4-bit.

    It is made of the source's floating tensors `origins` and of `dequantized` 4-bit weights. `read` gives its values in
    order and in pieces, in the dtype that they have in the source.
    """

    name: str
    shape: tuple[int, ...]
    origins: list[Floating]
    read: Callable[[], Iterator[torch.Tensor]]
    dequantized: int = 0


def normalize(
    source: Source,
    artifacts: Artifacts,
    options: RequantOptions,
    dtype: str,
    residual_scale: object = residual.AUTO,
    merge: Merge | None = None,
) -> dict:
    """Write every tensor that is not 4-bit in `dtype`, and every quantization state, and return the report.

    The deltas of `merge` are added to router and dense attention in float32, before they are rounded.

    UserError names the tensor where a value overflows or is not finite, or where `residual_scale`, which the plugin will
    apply, would lose too much; and it says so where the disk is too small. No file is written then.
    """
    scale = residual.resolve(residual_scale, dtype)
    stored_dtype = SAFETENSORS_NAMES[check_dtype(dtype)]
    plans = [plan_layer(source, layer, options) for layer in range(source.dimensions.layers)]
    targets = [target for plan in plans for target in plan]
    dense = list(_dense_tensors(source, plans, options.w13_order, merge))
    states = {
        f"{target.weight}.{names.STATE_PREFIX}{target.quant_type}": target.state(dtype).to_json()
        for target in targets
        if isinstance(target, QuantizedTarget)
    }
    declared = [Declared(tensor.name, stored_dtype, tensor.shape) for tensor in dense]
    declared += [Declared(name, "U8", state.shape) for name, state in states.items()]
    needed = sum(tensor.bytes for tensor in declared)  # stage fetch, which knows no dtype, counted in the source's
    require_disk(needed, artifacts.checkpoint, f"{artifacts.dense_weights.name} in {dtype}")
    counts: dict[str, CastCounts] = {}
    losses: dict[str, ScalingLoss] = {}
    with writing_tensors(artifacts.dense_weights, declared) as out:
        for tensor in dense:
            counts[tensor.name], loss = _write_cast(out, tensor, dtype, scale)
            if loss is not None:
                losses[tensor.name] = residual.require_small(loss, tensor.name, scale)
        for name, state in states.items():
            out.append(name, state)
    total = sum(counts.values(), CastCounts())
    return {
        "dtype": dtype,
        "source_dtypes": _dtypes_of_origins(dense),
        # Not "values": `dvc metrics show` takes a table with a column of that name for pandas' and ends in an error.
        "cast_values": total.values,
        "overflow": total.overflow,
        "underflow": total.underflow,
        "non_finite": total.non_finite,
        "underflow_by_tensor": [
            {"tensor": name, "values": c.values, "underflow": c.underflow} for name, c in counts.items() if c.underflow
        ],
        "dequantized": [tensor.name for tensor in dense if any(origin.dequantized for origin in tensor.origins)],
        "joined_dense": [target.name for target in targets if isinstance(target, DenseTarget) and target.joined],
        "scaling": residual.report(losses, scale),
    }


def _dtypes_of_origins(dense: list[DenseTensor]) -> dict[str, int]:
    """Number of the source's tensors by safetensors dtype."""
    counted = Counter("U8" if origin.dequantized else origin.dtype for tensor in dense for origin in tensor.origins)
    counted += Counter({"U8": sum(tensor.dequantized for tensor in dense)})
    return dict(sorted(counted.items()))


def _write_cast(out: TensorWriter, tensor: DenseTensor, dtype: str, scale: float) -> tuple[CastCounts, ScalingLoss | None]:
    """Write `tensor` in `dtype`. Returns what casting lost, and what `scale` will lose; None if it is not to be scaled."""
    torch_dtype = getattr(torch, dtype)
    counts = CastCounts()
    loss = ScalingLoss() if scale != 1 and residual.writes_to_stream(tensor.name) else None
    for piece in tensor.read():
        values, lost = cast(piece, torch_dtype)
        if lost.overflow or lost.non_finite:
            kind = "overflow" if lost.overflow else "values that are not finite"
            raise UserError(
                f"{kind} in {dtype}",
                where=_culprit(tensor.origins, torch_dtype) or tensor.name,
                got=f"{lost.overflow or lost.non_finite} of {lost.values}",
                expected="only values that the dtype can hold",
                next_step="use dtype=bfloat16 or dtype=float32" if lost.overflow else "repair the source",
            )
        counts += lost
        if loss is not None:
            loss += residual.scaling_loss(values, scale)
        out.append(tensor.name, values.contiguous().view(-1).view(torch.uint8).numpy())
    return counts, loss


def _culprit(origins: list[Floating], dtype: torch.dtype) -> str | None:
    """Stored name of the first origin with a value that `dtype` cannot hold. None where it is a 4-bit weight's."""
    for origin in origins:
        for piece in origin.read():
            _, counts = cast(piece, dtype)
            if counts.overflow or counts.non_finite:
                return origin.stored
    return None


def _dense_tensors(source: Source, plans: list[list[Target]], w13_order: str, merge: Merge | None) -> Iterator[DenseTensor]:
    """Every tensor of the result that is not 4-bit: first those outside the layers, then layer by layer."""

    def kept(name: str) -> DenseTensor:
        origin = source.floating(name)

        def read() -> Iterator[torch.Tensor]:
            delta = merge.delta(name.removesuffix(".weight")) if merge else None
            return iter([merged(origin.tensor(), delta)]) if delta else origin.read()

        return DenseTensor(name, origin.shape, [origin], read)

    for name in names.outside_shapes(source.dimensions):
        yield kept(name)
    for layer, targets in enumerate(plans):
        for name in names.kept_shapes(source.dimensions):
            yield kept(names.prefix(layer) + name)
        for target in targets:
            yield _fused_bias(source, target, w13_order)
            if isinstance(target, DenseTarget):
                yield _joined_weight(source, target, merge)


def _fused_bias(source: Source, target: Target, w13_order: str) -> DenseTensor:
    """The bias of `target`: [experts, rows] where experts are stacked, else [rows]."""
    origins = [source.floating(part.bias) for part in target.parts]

    def read() -> Iterator[torch.Tensor]:
        biases = _one_dtype([origin.tensor() for origin in origins])
        if target.fusion.stacked:
            yield torch.stack(biases)[:, target.row_order(w13_order)]
        else:
            yield torch.cat(biases)

    return DenseTensor(target.bias, target.shape[:-1], origins, read)


def _joined_weight(source: Source, target: DenseTarget, merge: Merge | None) -> DenseTensor:
    """The weight of `target`, [rows, in_features]: dense parts as stored, 4-bit parts dequantized to float32.

    Parts with a delta of `merge` are float32 too.
    """
    origins = {part: source.floating(part.weight) for part in target.parts if part.state is None}

    def read() -> Iterator[torch.Tensor]:
        deltas = merge.deltas(target) if merge else {}
        parts = []
        for part in target.parts:
            weight = origins[part].tensor() if part in origins else torch.from_numpy(source.dequantized(part))
            parts.append(merged(weight, deltas[part.name]) if part.name in deltas else weight)
        yield torch.cat(_one_dtype(parts))

    return DenseTensor(
        target.weight, target.shape, list(origins.values()), read, dequantized=len(target.parts) - len(origins)
    )


def _one_dtype(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """`parts` themselves if they share a dtype, else all of them in float32."""
    return parts if len({part.dtype for part in parts}) == 1 else [part.float() for part in parts]

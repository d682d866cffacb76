"""Bringing every floating tensor to one dtype, counting what that loses, and auditing the finished checkpoint."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from gptoss_nf4 import names
from gptoss_nf4.artifacts import Artifacts
from gptoss_nf4.checkpoint import FLOATING, Checkpoint
from gptoss_nf4.errors import UserError
from gptoss_nf4.files import write_file
from gptoss_nf4.fuse import w13_rows
from gptoss_nf4.plan import RequantOptions, Target, plan_layer
from gptoss_nf4.quant_state import DTYPES, QuantState
from gptoss_nf4.source import SplitSource

CHUNK_ELEMENTS = 1 << 24
SAFETENSORS_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# Quantization data, not weights: float32 whatever the model's dtype.
QUANTIZATION_SIDECARS = (".absmax", ".quant_map")


@dataclass
class CastCounts:
    """Values that a cast lost: finite ones that became infinite, non-zero ones that became zero, and bad ones."""

    values: int = 0
    overflow: int = 0
    underflow: int = 0
    non_finite: int = 0


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, CastCounts]:
    """`tensor` (any floating dtype and shape) in `dtype`, and what was lost; works in pieces to stay small in memory."""
    counts = CastCounts(values=tensor.numel())
    flat, result = tensor.reshape(-1), torch.empty(tensor.numel(), dtype=dtype)
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        before = flat[start : start + CHUNK_ELEMENTS]
        after = result[start : start + CHUNK_ELEMENTS].copy_(before)
        finite = torch.isfinite(before)
        counts.non_finite += int((~finite).sum())
        counts.overflow += int((finite & ~torch.isfinite(after)).sum())
        counts.underflow += int(((after == 0) & (before != 0)).sum())
    return result.reshape(tensor.shape), counts


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise UserError(
            "bad setting", where="dtype", got=repr(dtype), expected=f"one of {DTYPES}", next_step="pass dtype=float16"
        )
    return dtype


def normalize(source: SplitSource, artifacts: Artifacts, options: RequantOptions, dtype: str) -> dict:
    """Write every tensor that is not 4-bit in `dtype`, and the quantization states with it; returns the report.

    Raises a UserError that names the tensor where a value overflows or is not finite; nothing is written then.
    """
    target_dtype = getattr(torch, check_dtype(dtype))
    tensors: dict[str, torch.Tensor] = {}
    lossy: dict[str, dict] = {}
    total, joined_dense, source_dtypes = CastCounts(), [], {}
    for layer in range(source.dimensions.layers):
        for target in plan_layer(source, layer, options):
            if target.quantized:
                state = torch.from_numpy(target.state(dtype).to_json().copy())
                tensors[f"{target.name}.weight.{names.STATE_PREFIX}{target.quant_type}"] = state
            elif target.joined_dense:
                joined_dense.append(target.name)
    for name, origins, tensor in dense_tensors(source, options):
        for stored in (source.checkpoint.tensors[origin].dtype for origin in origins):
            source_dtypes[stored] = source_dtypes.get(stored, 0) + 1
        tensors[name], counts = cast(tensor, target_dtype)
        if counts.overflow or counts.non_finite:
            kind = "overflow" if counts.overflow else "values that are not finite"
            raise UserError(
                f"{kind} in {dtype}", where=_culprit(source, origins, target_dtype) or name,
                got=f"{counts.overflow or counts.non_finite} of {counts.values}", expected="none",
                next_step="use dtype=bfloat16 or dtype=float32" if counts.overflow else "repair the source",
            )  # fmt: skip
        if counts.underflow:
            lossy[name] = {"values": counts.values, "underflow": counts.underflow}
        for key, value in asdict(counts).items():
            setattr(total, key, getattr(total, key) + value)
    from safetensors.torch import save_file

    write_file(artifacts.dense_weights, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return {
        "dtype": dtype,
        "source_dtypes": dict(sorted(source_dtypes.items())),
        **asdict(total),
        "underflow_by_tensor": lossy,
        "joined_dense": joined_dense,
    }


def _culprit(source: SplitSource, origins: list[str], dtype: torch.dtype) -> str | None:
    """The first of the source tensors that does not fit `dtype`; None where it is a 4-bit one."""
    for origin in origins:
        if source.checkpoint.tensors[origin].floating:
            _, counts = cast(source.checkpoint.torch(origin), dtype)
            if counts.overflow or counts.non_finite:
                return origin
    return None


def dense_tensors(source: SplitSource, options: RequantOptions) -> Iterator[tuple[str, list[str], torch.Tensor]]:
    """(name in the result, source tensors it comes from, values) of everything that is not 4-bit."""
    for name in names.OUTSIDE_LAYERS:
        yield name, [name], source.checkpoint.torch(name)
    for layer in range(source.dimensions.layers):
        for old, new in names.RENAMED.items():
            name = names.prefix(layer) + old
            yield names.prefix(layer) + new, [name], source.checkpoint.torch(name)
        for target in plan_layer(source, layer, options):
            biases = [f"{part.name}.bias" for part in target.parts]
            yield f"{target.name}.bias", biases, _fused_bias(source, target, options.w13_order)
            if not target.quantized:
                yield f"{target.name}.weight", [part.weight for part in target.parts], _joined_weight(source, target)


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


def audit(checkpoint: Checkpoint, dtype: str) -> dict[str, int]:
    """Count the checkpoint's floating tensors by dtype; UserError if any is not `dtype` (quantization data apart)."""
    expected, found = SAFETENSORS_NAMES[dtype], {}
    for name, info in checkpoint.tensors.items():
        stored = info.dtype
        if f".{names.STATE_PREFIX}" in name:
            stored = SAFETENSORS_NAMES[QuantState.from_json(checkpoint.raw(name).tobytes(), name).dtype]
        elif name.endswith(QUANTIZATION_SIDECARS) or info.dtype not in FLOATING:
            continue
        found[stored] = found.get(stored, 0) + 1
        if stored != expected:
            raise UserError(
                "mixed dtypes", where=name, got=stored, expected=f"{expected} everywhere",
                next_step="run `dvc repro -f normalize assemble`",
            )  # fmt: skip
    return found

"""The disk, memory and time that a conversion will take, estimated from headers before the first byte is written."""

import math
from dataclasses import dataclass
from pathlib import Path

from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import ITEM_BYTES, SAFETENSORS_NAMES
from gptoss_nf4.source.interface import Source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.machine import available_memory, cores, free_disk
from gptoss_nf4.storage.progress import size_text

GIB = 1 << 30
MARGIN = 1.02  # headers, JSON files, DVC's records
# Time of a conversion and its proof, divided by that of hashing the source, beside what starting all stages takes. On two
# cores, of the 20b: hashing 12.5 GB took 4.3 to 5 s, stages/parallel.py 22, 31, 40 and 59 s for 1, 6, 12 and 24 layers, and
# stage prove 30 s. A conversion also reads the source, writes the result, and DVC hashes the result.
WORK_BY_HASHING, START_SECONDS = 14.0, 25.0
# Bytes for each weight of a module while bitsandbytes quantizes it and the error is counted in float64. One of [5760, 2880]
# took 0.7 GiB.
QUANTIZING = 44


@dataclass(frozen=True)
class Budget:
    """Bytes that are still to be written, and the peak memory of the largest process in bytes."""

    disk_bytes: int
    memory_bytes: int


def budget(source: Source, artifacts: Artifacts) -> Budget:
    """What converting `source` takes. Files that an earlier run has written are not counted again.

    Tensors that are not 4-bit count in the source's dtype: stage fetch does not depend on the result's, so that another
    dtype does not run it again. Stage normalize asks for room in the result's dtype before it writes.
    """
    missing = largest = 0
    for layer in range(source.dimensions.layers):
        codes, blocks, dense = _layer_sizes(source, layer)
        absmax = blocks * ITEM_BYTES["F32"]
        missing += (not artifacts.absmax(layer).exists()) * absmax
        missing += (not artifacts.layer_weights(layer).exists()) * (codes + absmax)
        missing += (not artifacts.dense_weights.exists()) * dense
        largest = max(largest, 2 * absmax)
    missing += (not artifacts.dense_weights.exists()) * _outside_bytes(source)
    largest = max(largest, QUANTIZING * _quantized_anew(source))
    return Budget(int(missing * MARGIN), largest + (400 << 20))  # 400 MiB: Python with torch


def stage_bytes(source: Source, stage: str, dtype: str) -> int:
    """About what `stage`, such as "requant@3" or "normalize", writes: what a progress bar goes up to."""
    kind, _, layer = stage.partition("@")
    if kind == "normalize":
        layers = range(source.dimensions.layers)
        dense = sum(_layer_sizes(source, each)[2] for each in layers) + _outside_bytes(source)
        return dense * ITEM_BYTES[SAFETENSORS_NAMES[dtype]] // ITEM_BYTES["BF16"]  # as nearly all sources have it
    codes, blocks, _ = _layer_sizes(source, int(layer))
    absmax = blocks * ITEM_BYTES["F32"]
    return absmax if kind == "dequant" else codes + absmax


def plan_line(plan: Budget, size: int, root: Path, hashing_speed: float | None) -> str:
    """What converting a source of `size` bytes below `root` takes, for the user: time, disk and memory.

    `hashing_speed` is in bytes a second; None where the time is not known.
    """
    seconds = None if hashing_speed is None else START_SECONDS + WORK_BY_HASHING * size / hashing_speed
    rough = "" if seconds is None else f"about {_duration(seconds)} on {cores()} cores, "
    disk = f"{size_text(plan.disk_bytes)} of disk ({free_disk(root) / 1e9:.0f} GB are free)"
    memory = f"{plan.memory_bytes / GIB:.1f} GiB of memory ({available_memory() / GIB:.0f} GiB are free)"
    return f"to convert and prove {size_text(size)}: {rough}{disk}, {memory}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _quantized_anew(source: Source) -> int:
    """Weights of the largest module that mode nf4 alone converts. 0 where there is none."""
    modules = (module for fusion in names.FUSIONS if fusion.stacked for module in source.modules(0, fusion))
    anew = (module for module in modules if module.state is None)
    return max((math.prod(module.shape) for module in anew), default=0)


def _layer_sizes(source: Source, layer: int) -> tuple[int, int, int]:
    """(bytes of codes, number of blocks, bytes of everything that is not 4-bit) of one layer."""
    codes = blocks = 0
    dense = sum(_bytes(source, names.prefix(layer) + name) for name in names.kept_shapes(source.dimensions))
    for fusion in names.FUSIONS:
        for module in source.modules(layer, fusion):
            dense += _bytes(source, module.bias)
            if fusion.stacked and module.state is None:  # mode nf4 quantizes it, by default in blocks of 64
                codes += math.prod(module.shape) // 2
                blocks += math.prod(module.shape) // 64
            elif module.state is None:
                dense += _bytes(source, module.weight)
            else:
                codes += module.state.elements // 2
                blocks += module.state.blocks
    return codes, blocks, dense


def _outside_bytes(source: Source) -> int:
    """Bytes of what is in no layer: embeddings, norm and head."""
    return sum(_bytes(source, name) for name in names.outside_shapes(source.dimensions))


def _bytes(source: Source, name: str) -> int:
    tensor = source.floating(name)
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def synthetic_bytes(d: Dimensions) -> int:
    """Bytes of a synthetic source: half a byte for a weight, one of absmax for 64 weights, and 16-bit embeddings."""
    weights = d.layers * d.hidden * (2 * d.q_rows + 2 * d.kv_rows + 3 * d.intermediate * d.experts)
    return int(MARGIN * (weights * (1 / 2 + 1 / 64) + 2 * 2 * d.vocabulary * d.hidden))

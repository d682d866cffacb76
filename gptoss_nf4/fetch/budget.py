"""What a conversion will take, from headers alone: disk, memory and time, before the first byte is written."""

import math
from dataclasses import dataclass

from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import ITEM_BYTES
from gptoss_nf4.source.interface import Source
from gptoss_nf4.storage.artifacts import Artifacts

MARGIN = 1.02  # headers, JSON files, DVC's records
# stages/parallel.py took 53 to 59 s where hashing the source had taken 4.3 to 5 (24 layers of the 20b, 2 cores): bytes are
# read, written and hashed again by DVC.
WORK_BY_HASHING = 12.0


@dataclass(frozen=True)
class Budget:
    """Bytes still to be written, and the largest process's memory."""

    disk_bytes: int
    memory_bytes: int

    def line(self) -> str:
        return f"{self.disk_bytes / 1e9:.1f} GB of disk, {self.memory_bytes / 2**30:.1f} GiB of memory"


def budget(source: Source, artifacts: Artifacts) -> Budget:
    """Of converting `source`; what lies there from an earlier run counts as written."""
    missing = largest = 0
    for layer in range(source.dimensions.layers):
        codes, blocks, dense = _layer_sizes(source, layer)
        absmax = blocks * ITEM_BYTES["F32"]
        missing += (not artifacts.absmax(layer).exists()) * absmax
        missing += (not artifacts.layer_weights(layer).exists()) * (codes + absmax)
        missing += (not artifacts.dense_weights.exists()) * dense
        largest = max(largest, 2 * absmax)
    outside = sum(_bytes(source, name) for name in names.outside_shapes(source.dimensions))
    missing += (not artifacts.dense_weights.exists()) * outside
    return Budget(int(missing * MARGIN), largest + (400 << 20))  # 400 MiB: Python with torch


def _layer_sizes(source: Source, layer: int) -> tuple[int, int, int]:
    """(bytes of codes, blocks, bytes of everything that is not 4-bit)."""
    codes = blocks = 0
    dense = sum(_bytes(source, names.prefix(layer) + name) for name in names.kept_shapes(source.dimensions))
    for fusion in names.FUSIONS:
        for module in source.modules(layer, fusion):
            dense += _bytes(source, module.bias)
            if module.state is None:
                dense += _bytes(source, module.weight)
            else:
                codes += module.state.elements // 2
                blocks += module.state.blocks
    return codes, blocks, dense


def _bytes(source: Source, name: str) -> int:
    tensor = source.floating(name)
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def synthetic_bytes(d: Dimensions) -> int:
    """Of a source in the split layout: half a byte a weight, an absmax byte for 64, 16-bit embeddings."""
    weights = d.layers * d.hidden * (2 * d.q_rows + 2 * d.kv_rows + 3 * d.intermediate * d.experts)
    return int(MARGIN * (weights * (1 / 2 + 1 / 64) + 2 * 2 * d.vocabulary * d.hidden))

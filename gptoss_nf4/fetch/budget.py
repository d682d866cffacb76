"""What a conversion will take, from headers alone: disk, memory and time, before the first byte is written."""

from dataclasses import dataclass

from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import ITEM_BYTES
from gptoss_nf4.source.split import SplitSource
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


def budget(source: SplitSource, artifacts: Artifacts) -> Budget:
    """Of converting `source`; what lies there from an earlier run counts as written."""
    missing = largest = 0
    for layer in range(source.dimensions.layers):
        codes, blocks, dense = _layer_sizes(source, layer)
        absmax = blocks * ITEM_BYTES["F32"]
        missing += (not artifacts.absmax(layer).exists()) * absmax
        missing += (not artifacts.layer_weights(layer).exists()) * (codes + absmax)
        missing += (not artifacts.dense_weights.exists()) * dense
        largest = max(largest, 2 * absmax)
    outside = source.tensors_by_layer.get(None, [])
    missing += (not artifacts.dense_weights.exists()) * sum(source.checkpoint.tensors[name].bytes for name in outside)
    return Budget(int(missing * MARGIN), largest + (400 << 20))  # 400 MiB: Python with torch


def _layer_sizes(source: SplitSource, layer: int) -> tuple[int, int, int]:
    """(bytes of codes, blocks, bytes of everything that is not 4-bit)."""
    codes = blocks = dense = 0
    for name in source.tensors_by_layer[layer]:
        info = source.checkpoint.tensors[name]
        if name.endswith(".weight") and info.dtype == "U8":
            codes += info.bytes
        elif name.endswith(".weight.absmax"):
            blocks += info.bytes // ITEM_BYTES[info.dtype]
        elif info.floating and ".weight." not in name:
            dense += info.bytes
    return codes, blocks, dense


def synthetic_bytes(d: Dimensions) -> int:
    """Of a source in the split layout: half a byte a weight, an absmax byte for 64, 16-bit embeddings."""
    weights = d.layers * d.hidden * (2 * d.q_rows + 2 * d.kv_rows + 3 * d.intermediate * d.experts)
    return int(MARGIN * (weights * (1 / 2 + 1 / 64) + 2 * 2 * d.vocabulary * d.hidden))

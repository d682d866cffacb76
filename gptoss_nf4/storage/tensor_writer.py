"""Writing safetensors piece by piece: the header first, then every tensor's bytes as they are made.

The safetensors library wants all tensors in memory at once. A layer of gpt-oss-120b is 2.3 GB, the embeddings of any of
them 1.2 GB; written in pieces a conversion needs the memory of one expert.
Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptoss_nf4.format.dtypes import ITEM_BYTES
from gptoss_nf4.storage.writing import write_file

ALIGNMENT = 8  # of the data, as the safetensors library has it


@dataclass(frozen=True)
class Stream:
    """One tensor to be written: `pieces` are arrays whose bytes, joined, are the tensor's, in row-major order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def whole(name: str, dtype: str, array: np.ndarray) -> Stream:
    """A tensor that is in memory already."""
    return Stream(name, dtype, array.shape, [array])


def write_tensors(target: Path, streams: list[Stream]) -> int:
    """Write `streams` in their order, with a bar on a terminal; returns the file's bytes.

    Pieces are taken from one stream after the other, so a later stream's may depend on an earlier one having been read.
    `format: pt` in the header is what transformers and vLLM expect.
    """
    header = _header(streams)
    size = sum(stream.bytes for stream in streams)

    def write(path: Path) -> None:
        from tqdm import tqdm

        # disable=None: no bar where stderr is not a terminal.
        with path.open("wb") as file, tqdm(total=size, desc=target.name, unit="B", unit_scale=True, disable=None) as bar:
            file.write(header)
            for stream in streams:
                written = 0
                for piece in stream.pieces:
                    file.write(memoryview(np.ascontiguousarray(piece)).cast("B"))
                    written += piece.nbytes
                    bar.update(piece.nbytes)
                if written != stream.bytes:
                    raise ValueError(f"{stream.name}: {written} bytes written, {stream.bytes} announced")

    write_file(target, write)
    return len(header) + size


def _header(streams: list[Stream]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for stream in streams:
        if start % ITEM_BYTES[stream.dtype]:
            raise ValueError(f"{stream.name} would not be aligned at byte {start}")
        entries[stream.name] = {"dtype": stream.dtype, "shape": stream.shape, "data_offsets": (start, start + stream.bytes)}
        start += stream.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

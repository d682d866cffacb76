"""Writing a safetensors file piece by piece: the header first, then each tensor's bytes as they are made.

The safetensors library wants all tensors in memory at once. A layer of gpt-oss-120b has 2.3 GB, and the embeddings of
either gpt-oss have 1.2 GB. Written in pieces, a layer needs little more memory than its absmax and one expert.
Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptoss_nf4.format.dtypes import ITEM_BYTES
from gptoss_nf4.storage.progress import Progress
from gptoss_nf4.storage.writing import replacing

ALIGNMENT = 8  # bytes; the safetensors library begins the data at a multiple of it


@dataclass(frozen=True)
class Declared:
    """A tensor to be written. `dtype` is a safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@contextmanager
def writing_tensors(target: Path, declared: Sequence[Declared]) -> Iterator["TensorWriter"]:
    """Write a safetensors file whose tensors are declared first, then filled in that order.

    >>> with writing_tensors(path, [Declared("w", "U8", (4, 2)), Declared("s", "F32", (4,))]) as out:
    ...     for rows in np.split(codes, 2):
    ...         out.append("w", rows)
    ...     out.append("s", scales)

    `target` appears when the block ends without an error and every tensor is whole. Meanwhile a `Progress` is shown.
    ValueError where the bytes are not those declared; UserError where the file cannot be written.
    """
    header = _header(declared)
    size = len(header) + sum(tensor.bytes for tensor in declared)
    with replacing(target) as file, Progress(size, f"writing {target.name}") as progress:
        file.write(header)
        progress.advance(len(header))
        out = TensorWriter(file, progress, declared, size)
        yield out
        out.require_whole()


class TensorWriter:
    """Takes the bytes of declared tensors, one tensor after the other. `size` is the whole file's, in bytes."""

    def __init__(self, file: BinaryIO, progress: Progress, declared: Sequence[Declared], size: int):
        self.size = size
        self._file, self._progress = file, progress
        self._waiting = deque(declared)
        self._missing = self._waiting[0].bytes if declared else 0  # bytes of the first that waits

    def append(self, name: str, *pieces: np.ndarray) -> None:
        """Write the next bytes of tensor `name`: those of `pieces`, each row-major. ValueError if others are due."""
        for piece in pieces:
            if not self._waiting or self._waiting[0].name != name or piece.nbytes > self._missing:
                raise ValueError(f"{piece.nbytes} bytes of {name} appended, but {self._expected()}")
            self._file.write(np.ascontiguousarray(piece).data.cast("B"))
            self._progress.advance(piece.nbytes)
            self._missing -= piece.nbytes
            if not self._missing:
                self._waiting.popleft()
                self._missing = self._waiting[0].bytes if self._waiting else 0

    def require_whole(self) -> None:
        """ValueError where a declared tensor still lacks bytes."""
        if self._waiting:
            raise ValueError(f"the file is not whole: {self._expected()}")

    def _expected(self) -> str:
        return f"{self._missing} bytes of {self._waiting[0].name} come next" if self._waiting else "all is written"


def _header(declared: Sequence[Declared]) -> bytes:
    """Length, JSON and padding. `format: pt` is what transformers and vLLM expect."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in declared:
        if start % ITEM_BYTES[tensor.dtype]:
            raise ValueError(f"{tensor.name} would not be aligned at byte {start}")
        end = start + tensor.bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

"""One safetensors file: its header, checked, and the bytes of its tensors.

The safetensors library would read bfloat16 through torch only. The stages of a layer need no bfloat16, so reading raw
bytes spares each of them the import of torch.
Format: https://github.com/huggingface/safetensors#format (8-byte header length, JSON header, data).
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptoss_nf4.errors import COPY_AGAIN, UserError
from gptoss_nf4.format.dtypes import FLOATING, ITEM_BYTES, NUMPY_DTYPES
from gptoss_nf4.storage.reading import parsed_json, reading

# Three times what gpt-oss-120b would need in one file. The safetensors library allows 100 MB, but a header of empty lists
# takes twenty times its size in memory once it is parsed.
MAX_HEADER_BYTES = 1 << 25
# No tensor of gpt-oss has more than four. A product of many large numbers takes minutes, and Python does not print it.
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is a safetensors name; `start` and `end` are bytes from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATING


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor that a safetensors file declares, by name.

    UserError for a damaged header, a tensor that does not fill its shape or lies outside the file, and a hole between two.
    """

    def damaged(got: str, expected: str) -> UserError:
        return UserError("damaged shard", where=file, got=got, expected=expected, next_step=COPY_AGAIN)

    with reading(file), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise damaged(f"a file of {size} bytes", "a safetensors file, which begins with 8 bytes of length")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged(f"a header of {length} bytes in a file of {size}", "a header that ends inside the file")
        try:
            text = stream.read(length).decode()  # json.loads alone would take UTF-16 too, which no other reader does
            header = parsed_json(text, object_pairs_hook=_unique, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise damaged(f"a header that is not JSON ({error})", "a JSON header") from None
    if not isinstance(header, dict):
        raise damaged("a header that is not a JSON object", "a JSON object")
    metadata = header.pop("__metadata__", None)
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise damaged(f"__metadata__ of {str(metadata)[:80]}", "texts by name")

    tensors = {}
    data_start = 8 + length
    for name, entry in header.items():
        stored = entry.get("dtype") if isinstance(entry, dict) else None
        if isinstance(stored, str) and stored not in ITEM_BYTES:
            raise UserError(
                "unknown dtype",
                where=file,
                got=f"tensor {name} in {stored[:40]!r}",
                expected=f"one of {', '.join(ITEM_BYTES)}",
                next_step="save the model in 4 bit or in 16 bit, or copy the file again",
            )
        try:
            if not isinstance(entry["shape"], list) or not isinstance(entry["data_offsets"], list):
                raise TypeError
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (start, end, *shape)
            if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):  # not 8.0, true
                raise ValueError
            expected_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        except (KeyError, TypeError, ValueError):
            raise damaged(f"tensor {name} with header {str(entry)[:80]}", "a known dtype, shape and data_offsets") from None
        if not start <= end <= size - data_start:
            raise damaged(
                f"tensor {name} at bytes {start} to {end} of the data", f"a place within its {size - data_start} bytes"
            )
        if end - start != expected_bytes:
            raise damaged(f"tensor {name} with {end - start} bytes", f"{expected_bytes} bytes for {dtype} {list(shape)}")
        tensors[name] = TensorInfo(name, dtype, shape, file, data_start + start, data_start + end)
    place = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):  # the format allows no holes
        if info.start != place:
            raise damaged(
                f"tensor {info.name} at byte {info.start}", f"a tensor at byte {place}, where the one before ends"
            )
        place = info.end
    if place != size:
        raise damaged(f"{size - place} bytes after the last tensor", "a file that ends with its last tensor")
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object of `pairs`; ValueError where a key comes twice, of which Python would keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that comes twice")
    return result


def _no_number(name: str) -> None:
    """ValueError for NaN and Infinity, which Python's JSON takes for numbers."""
    raise ValueError(f"{name} is no number")


def read_range(file: Path, start: int, end: int) -> np.ndarray:
    """Bytes `start` to `end` of a file, uint8 [end - start]. UserError where they cannot be read or the file ends before.

    The file is not mapped: mapped pages count as the process's memory, and a read error would be a signal.
    """
    data = np.empty(end - start, np.uint8)
    with reading(file), file.open("rb", buffering=0) as stream:
        stream.seek(start)
        view = data.data
        while view:
            count = stream.readinto(view)
            if not count:
                raise UserError(
                    "damaged shard",
                    where=file,
                    got=f"the end of the file at byte {end - len(view)}",
                    expected=f"at least {end} bytes",
                    next_step=COPY_AGAIN,
                )
            view = view[count:]
    return data


def read_array(info: TensorInfo) -> np.ndarray:
    """The tensor in its own shape and dtype, which must be one of NUMPY_DTYPES: NumPy has no bfloat16."""
    return read_range(info.file, info.start, info.end).view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)

"""Opening a safetensors checkpoint: every tensor by name, read where it lies when it is asked for.

Reading raw bytes keeps torch out of the per-layer stages: numpy has no bfloat16, and those stages need none.
Format: https://github.com/huggingface/safetensors#format (8-byte header length, JSON header, data).
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.errors import UserError

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
PIECE_BYTES = 1 << 23  # a multiple of every item's size

ITEM_BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
NUMPY_DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "F64": np.float64}
TORCH_DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
FLOATING = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `end` are byte offsets from the beginning of `file`."""

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


class Checkpoint:
    """A directory with config.json and safetensors files, one of them or several with an index.

    >>> source = Checkpoint(Path("artifacts/tiny/source"))
    >>> source.tensors["model.norm.weight"].shape
    (192,)
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if not directory.is_dir():
            raise UserError(
                "no checkpoint", where=directory, got="no such directory",
                expected="a directory with config.json and *.safetensors", next_step="check model.path",
            )  # fmt: skip
        self.config = read_json_object(directory / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.weight_files:
            for info in read_header(file).values():
                self._add(info)
        self._check_index()

    @cached_property
    def weight_files(self) -> list[Path]:
        """The shards in order: those that the index names, or every *.safetensors file where there is no index."""
        index = self.directory / INDEX_FILE
        if not index.exists():
            files = sorted(self.directory.glob("*.safetensors"))
            if not files:
                raise UserError(
                    "no weights", where=self.directory, got="no *.safetensors file", expected="at least one",
                    next_step="save the model with safe_serialization=True",
                )  # fmt: skip
            return files
        names = sorted(set(self._weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(
                    "bad index", where=index, got=f"file name {name!r}", expected="a plain file name",
                    next_step="do not use this checkpoint",
                )  # fmt: skip
            if not (self.directory / name).is_file():
                raise UserError(
                    "missing shard", where=self.directory, got=f"no file {name}",
                    expected=f"{len(names)} shards named in {INDEX_FILE}", next_step="download it again",
                )  # fmt: skip
        return [self.directory / name for name in names]

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        path = self.directory / INDEX_FILE
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise UserError(
                "bad index", where=path, got="no weight_map of names to files", expected="one",
                next_step="download it again",
            )  # fmt: skip
        return weight_map

    def _add(self, info: TensorInfo) -> None:
        if info.name in self.tensors:
            raise UserError(
                "duplicated tensor", where=info.name, got=f"it in {self.tensors[info.name].file.name} and {info.file.name}",
                expected="one copy", next_step="remove the shard that does not belong",
            )  # fmt: skip
        self.tensors[info.name] = info

    def _check_index(self) -> None:
        if not (self.directory / INDEX_FILE).exists():
            return
        missing = sorted(set(self._weight_map) - set(self.tensors))
        if missing:
            raise UserError(
                "missing tensor", where=self.directory, got=f"no {missing[0]} ({len(missing)} missing in all)",
                expected=f"every tensor that {INDEX_FILE} names", next_step="download it again",
            )  # fmt: skip

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 [nbytes], in memory of their own."""
        info = self.tensors[name]
        return _read(info.file, info.start, info.end)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The tensor's bytes in order, a few megabytes at a time."""
        info = self.tensors[name]
        for start in range(info.start, info.end, PIECE_BYTES):
            yield _read(info.file, start, min(start + PIECE_BYTES, info.end))

    def numpy(self, name: str) -> np.ndarray:
        """The tensor as stored; bfloat16 has no numpy dtype: use `torch` for it."""
        info = self.tensors[name]
        return self.raw(name).view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)

    def torch(self, name: str) -> "torch.Tensor":
        """The tensor as stored, any floating dtype or uint8."""
        return _as_torch(self.raw(name), self.tensors[name].dtype).reshape(self.tensors[name].shape)

    def torch_row(self, name: str, number: int) -> "torch.Tensor":
        """Element `number` of the tensor's first dimension: of a stack of experts, one."""
        info = self.tensors[name]
        size = info.bytes // info.shape[0]
        start = info.start + number * size
        return _as_torch(_read(info.file, start, start + size), info.dtype).reshape(info.shape[1:])

    def torch_pieces(self, name: str) -> "Iterator[torch.Tensor]":
        """The tensor's values in order, flat, a few megabytes at a time."""
        return (_as_torch(piece, self.tensors[name].dtype) for piece in self.pieces(name))


def _read(file: Path, start: int, end: int) -> np.ndarray:
    """Bytes of a file. Not mapped: mapped pages count as a process's memory, and a read error would be a signal."""
    data = np.empty(end - start, np.uint8)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            view = memoryview(data)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise UserError(
                        "damaged shard", where=file, got=f"an end at byte {end - len(view)}",
                        expected=f"{end} bytes or more", next_step="fetch the file again",
                    )  # fmt: skip
                view = view[count:]
    except OSError as error:
        raise UserError(
            "cannot read", where=file, got=error.strerror or error, expected="a file that can be read",
            next_step="make it readable, or check the disk, and run the command again",
        ) from None  # fmt: skip
    return data


def _as_torch(data: np.ndarray, dtype: str) -> "torch.Tensor":
    import torch

    return torch.from_numpy(data).view(getattr(torch, TORCH_DTYPES[dtype]))


def read_json_object(path: Path) -> dict:
    """The JSON object in `path`, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "missing file", where=path.parent, got=f"no {path.name}", expected="one", next_step="fetch the model again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            "not JSON", where=path, got=error, expected="a JSON object", next_step="fetch the model again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            "not a JSON object", where=path, got=type(value).__name__, expected="an object",
            next_step="fetch the model again",
        )  # fmt: skip
    return value


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor that a safetensors file declares, checked to lie inside the file and to fill its shape."""
    size = file.stat().st_size

    def damaged(got: str, expected: str) -> UserError:
        return UserError("damaged shard", where=file, got=got, expected=expected, next_step="fetch the file again")

    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise damaged(f"{size} bytes", "a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged(f"a header of {length} bytes in a file of {size}", "a header inside the file")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise damaged(f"a header that is not JSON ({error})", "a JSON header") from None
    if not isinstance(header, dict):
        raise damaged("a header that is no JSON object", "a JSON object")

    tensors = {}
    data_start = 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            expected_bytes = math.prod(shape) * ITEM_BYTES[dtype]
            inside = 0 <= start <= end <= size - data_start and all(type(n) is int and n >= 0 for n in (start, *shape))
        except (KeyError, TypeError, ValueError):
            raise damaged(f"tensor {name} with header {str(entry)[:80]}", "a known dtype, shape and data_offsets") from None
        if not inside:
            raise damaged(f"tensor {name} at {start}:{end} of {size - data_start} data bytes", "it inside the file")
        if end - start != expected_bytes:
            raise damaged(f"tensor {name} with {end - start} bytes", f"{expected_bytes} for {dtype} {list(shape)}")
        tensors[name] = TensorInfo(name, dtype, shape, file, data_start + start, data_start + end)
    place = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):  # the format allows no holes either
        if info.start != place:
            raise damaged(f"tensor {info.name} at byte {info.start}", f"it at {place}, where the one before ends")
        place = info.end
    if place != size:
        raise damaged(f"{size - place} bytes after the last tensor", "none")
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object of `pairs`; ValueError where a key comes twice, of which Python would keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that comes twice")
    return result

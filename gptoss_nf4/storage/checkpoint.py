"""Opening a safetensors checkpoint: headers at once, each tensor only when it is asked for."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.errors import COPY_AGAIN, UserError
from gptoss_nf4.format.dtypes import TORCH_DTYPES
from gptoss_nf4.storage.reading import read_json_object, reading
from gptoss_nf4.storage.tensor_reader import TensorInfo, read_array, read_header, read_range

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Beginnings of files that may lie beside a model: an adapter, the same weights in another layout, a trainer's state.
OTHER_FILES = ("adapter_", "consolidated", "optimizer", "scheduler")
PIECE_BYTES = 1 << 23  # a multiple of every item's size
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside the weights of an adapter


def is_adapter(directory: Path) -> bool:
    """Whether `directory` holds a LoRA adapter and no model. Some trainers write the base's config.json beside it too."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return False
    weights = (*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin"))
    return not (directory / "config.json").is_file() or all(file.name.startswith(OTHER_FILES) for file in weights)


class Checkpoint:
    """A directory with config.json and the safetensors files that transformers would load: see `weight_files`.

    Opening reads config.json, the index and every header. UserError where one is missing, damaged or contradicts another.

    >>> source = Checkpoint(Path("artifacts/tiny/source"))
    >>> source.tensors["model.norm.weight"].shape
    (192,)
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if not directory.is_dir():
            raise UserError(
                "no checkpoint",
                where=directory,
                got="no such directory",
                expected="a directory with config.json and *.safetensors",
                next_step="check model.path",
            )
        self.config = read_json_object(directory / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.weight_files:
            for info in read_header(file).values():
                self._add(info)
        self._check_index()

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that count, sorted, by transformers' rule (`modeling_utils._get_resolved_checkpoint_files`).

        model.safetensors counts alone: an index beside it is left over. Else those that the index names. Where there is
        neither, which transformers refuses, the files named like shards of a model, else those with other names.
        """
        if (self.directory / SINGLE_FILE).is_file():
            return [self.directory / SINGLE_FILE]
        if not self._has_index:
            # macOS puts `._name` beside a file that it copies.
            found = sorted(f for f in self.directory.glob("*.safetensors") if f.is_file() and not f.name.startswith("."))
            files = [f for f in found if f.name.startswith("model")]
            files = files or [f for f in found if not f.name.startswith(OTHER_FILES)] or found
            if not files:
                raise UserError(
                    "no weights",
                    where=self.directory,
                    got="no *.safetensors file",
                    expected="at least one such file",
                    next_step="save the model with safe_serialization=True",
                )
            return files
        names = sorted(set(self.weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(
                    "bad index",
                    where=self.directory / INDEX_FILE,
                    got=f"file name {name!r}",
                    expected="a plain file name",
                    next_step="do not use this checkpoint",
                )
            with reading(self.directory / name):
                there = (self.directory / name).is_file()
            if not there:
                raise UserError(
                    "missing shard",
                    where=self.directory,
                    got=f"no file {name}",
                    expected=f"{len(names)} shards named in {INDEX_FILE}",
                    next_step=COPY_AGAIN,
                )
        return [self.directory / name for name in names]

    @property
    def _has_index(self) -> bool:
        """Whether there is an index that counts: beside model.safetensors it does not."""
        return (self.directory / INDEX_FILE).is_file() and not (self.directory / SINGLE_FILE).is_file()

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """The index: file name by tensor name. UserError where the index is missing or damaged."""
        path = self.directory / INDEX_FILE
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise UserError(
                "bad index",
                where=path,
                got="no weight_map that names files",
                expected="a weight_map from tensor names to file names",
                next_step=COPY_AGAIN,
            )
        return weight_map

    def _add(self, info: TensorInfo) -> None:
        if info.name in self.tensors:
            raise UserError(
                "duplicated tensor",
                where=info.name,
                got=f"a copy in {self.tensors[info.name].file.name} and one in {info.file.name}",
                expected="one copy",
                next_step="remove the shard that does not belong",
            )
        self.tensors[info.name] = info

    def _check_index(self) -> None:
        if not self._has_index:
            return
        missing = sorted(set(self.weight_map) - set(self.tensors))
        if missing:
            raise UserError(
                "missing tensor",
                where=self.directory,
                got=f"no {missing[0]} ({len(missing)} missing in all)",
                expected=f"every tensor that {INDEX_FILE} names",
                next_step=COPY_AGAIN,
            )

    def raw(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Bytes `first` to `last` of the tensor, uint8 [last - first], in a new array. All of them by default."""
        info = self.tensors[name]
        return read_range(info.file, info.start + first, info.end if last is None else info.start + last)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The tensor's bytes in order: uint8 arrays of at most PIECE_BYTES."""
        info = self.tensors[name]
        for start in range(info.start, info.end, PIECE_BYTES):
            yield read_range(info.file, start, min(start + PIECE_BYTES, info.end))

    def numpy(self, name: str) -> np.ndarray:
        """The tensor in its own shape and dtype. NumPy has no bfloat16: use `torch` for that."""
        return read_array(self.tensors[name])

    def torch(self, name: str) -> "Tensor":
        """The tensor in its own shape and dtype: uint8 or any floating one."""
        return _as_torch(self.raw(name), self.tensors[name].dtype).reshape(self.tensors[name].shape)

    def torch_row(self, name: str, number: int) -> "Tensor":
        """`torch(name)[number]`, without reading the rest: one expert of a stack."""
        info = self.tensors[name]
        size = info.bytes // info.shape[0]
        start = info.start + number * size
        return _as_torch(read_range(info.file, start, start + size), info.dtype).reshape(info.shape[1:])

    def torch_pieces(self, name: str) -> "Iterator[Tensor]":
        """The tensor's values in order: flat tensors of at most PIECE_BYTES."""
        return (_as_torch(piece, self.tensors[name].dtype) for piece in self.pieces(name))

    def forget(self, names: list[str]) -> None:
        """Tell the system that its page cache need not keep these tensors any longer.

        Source and result together are larger than the memory of many machines. DVC reads the result again, the source
        nobody.
        """
        for file in self.weight_files:
            with file.open("rb") as stream:
                for info in (self.tensors[name] for name in names):
                    if info.file == file:
                        os.posix_fadvise(stream.fileno(), info.start, info.bytes, os.POSIX_FADV_DONTNEED)


def _as_torch(data: np.ndarray, dtype: str) -> "Tensor":
    import torch

    return torch.from_numpy(data).view(getattr(torch, TORCH_DTYPES[dtype]))

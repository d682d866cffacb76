"""The values of stored tensors, a few rows at a time. 4-bit ones are dequantized by bitsandbytes."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, get_4bit_type

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.proof.names import is_four_bit, published, with_sidecars
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.tensor_reader import TensorInfo, read_range

# Floating dtypes by their names in a safetensors header (https://github.com/huggingface/safetensors#format).
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Values read at a time. Both sides then fit into a core's cache, which is five times as fast as a whole expert.
PIECE_VALUES = 1 << 20


class Values(Protocol):
    """A tensor's values in row-major order."""

    shape: tuple[int, ...]

    def read(self, first: int, last: int) -> torch.Tensor:
        """The values from number `first` to `last`, flat."""


class Dense:
    """A floating tensor. Values have its own dtype."""

    def __init__(self, info: TensorInfo):
        if info.dtype not in DTYPES:
            raise _unreadable(info.name, f"{info.dtype} without a quantization state", "a floating dtype")
        self.shape, self.dtype, self._info = info.shape, DTYPES[info.dtype], info

    def read(self, first: int, last: int) -> torch.Tensor:
        start, size = self._info.start, self.dtype.itemsize
        return torch.from_numpy(read_range(self._info.file, start + first * size, start + last * size)).view(self.dtype)


class FourBit:
    """A 4-bit tensor, whose codes may be stored as any dtype. Values are float32, as bitsandbytes dequantizes them.

    `blocks` are its (quant_type, blocksize).
    """

    def __init__(self, codes: TensorInfo, state: QuantState):
        self.shape = tuple(state.shape)
        if codes.bytes != -(-prod(self.shape) // 2):
            raise _unreadable(codes.name, f"{codes.bytes} bytes", f"half a byte for each weight of {list(self.shape)}")
        if not torch.equal(state.code, get_4bit_type(state.quant_type, device="cpu")):
            raise _unreadable(f"{codes.name}.quant_map", "other values", f"bitsandbytes' {state.quant_type} codebook")
        self._codes, self._state = codes, state
        self.blocks = (state.quant_type, state.blocksize)
        self._absmax = state.absmax
        if state.nested:
            self._absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset

    def read(self, first: int, last: int) -> torch.Tensor:
        block = self._state.blocksize
        begin = first // block * block
        codes = read_range(self._codes.file, self._codes.start + begin // 2, self._codes.start + -(-last // 2))
        # One row: bitsandbytes' CPU kernel would begin a new block with each row, also where rows are not whole blocks.
        state = QuantState(
            absmax=self._absmax[begin // block : -(-last // block)],
            shape=torch.Size([1, last - begin]),
            dtype=torch.float32,
            blocksize=block,
            quant_type=self._state.quant_type,
        )
        return dequantize_4bit(torch.from_numpy(codes).view(-1, 1), state).view(-1)[first - begin :]


@dataclass(frozen=True)
class Matrix:
    """One weight or vector within a tensor: `rows` by `columns` values from number `start` on. `name` is for messages.

    `transposed` says that they are stored column by column.
    """

    name: str
    values: Values
    start: int
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def rows_at_a_time(self) -> int:
        """An even number: rows of gate and up come in pairs."""
        return self.rows if self.transposed else max(2, PIECE_VALUES // self.columns // 2 * 2)

    def read(self, first: int, last: int) -> torch.Tensor:
        """The rows from number `first` to `last`, [rows, columns]. Where they are stored transposed: only all of them."""
        if self.transposed:
            return self.values.read(self.start, self.start + self.rows * self.columns).view(self.columns, self.rows).T
        start = self.start + first * self.columns
        return self.values.read(start, start + (last - first) * self.columns).view(-1, self.columns)


class Tensors:
    """The tensors of a directory by published name: `stored` says where they lie."""

    def __init__(self, directory: Path):
        self.checkpoint = Checkpoint(directory)
        self.stored: dict[str, TensorInfo] = {}
        for name, info in self.checkpoint.tensors.items():
            if published(name) in self.stored:
                raise _unreadable(name, f"also {self.stored[published(name)].name}", "one tensor of a meaning")
            self.stored[published(name)] = info

    def four_bit(self, name: str) -> bool:
        return is_four_bit(name, self.stored)

    def bytes(self, name: str) -> int:
        """Bytes of tensor `name` and of what lies beside it."""
        return sum(self.stored[each].bytes for each in with_sidecars(name, self.stored))

    def state(self, name: str) -> QuantState:
        """bitsandbytes' state of 4-bit tensor `name`. UserError where bitsandbytes cannot read it."""
        beside = with_sidecars(name, self.stored)[1:]
        tensors = {each: self._whole(self.stored[each]) for each in beside}
        try:
            return QuantState.from_dict(tensors, device=torch.device("cpu"))
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {first_line(error)}"
            raise _unreadable(name, got, "a quantization state that bitsandbytes reads") from None

    def values(self, name: str) -> Values:
        return FourBit(self.stored[name], self.state(name)) if self.four_bit(name) else Dense(self.stored[name])

    def matrices(self, name: str, fused: bool) -> list[Matrix]:
        """The matrix or vector that tensor `name` is; or, if it is `fused`, each expert's."""
        values = self.values(name)
        if not fused:
            return [Matrix(name, values, 0, values.shape)]
        experts, *shape = values.shape
        transposed = len(shape) > 1
        shape = shape[::-1]
        return [
            Matrix(f"{name}[{number}]", values, number * prod(shape), tuple(shape), transposed) for number in range(experts)
        ]

    @staticmethod
    def _whole(info: TensorInfo) -> torch.Tensor:
        if info.dtype == "U8":
            return torch.from_numpy(read_range(info.file, info.start, info.end))
        return Dense(info).read(0, prod(info.shape))


def _unreadable(name: str, got: str, expected: str) -> UserError:
    return UserError("cannot compare", where=name, got=got, expected=expected, next_step="run `dvc repro -f prove`")

"""The values of stored tensors, a few rows at a time. 4-bit ones are dequantized by bitsandbytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from gptoss_nf4.eager_bnb import bnb
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
    """4-bit weights in the order in which bitsandbytes stores them. Values are float32, as bitsandbytes dequantizes them.

    `blocks` are their (quant_type, blocksize), `absmax` gives them, float32, flat: it is called once they are needed.
    `codes` gives the bytes from number `first` to `last`, two codes each.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        blocks: tuple[str, int],
        absmax: Callable[[], torch.Tensor],
        codes: Callable[[int, int], np.ndarray],
    ):
        self.shape, self.blocks = shape, blocks
        self._make_absmax, self._codes = absmax, codes

    @cached_property
    def _absmax(self) -> torch.Tensor:
        return self._make_absmax()

    @classmethod
    def stored(cls, codes: TensorInfo, state: bnb.QuantState) -> "FourBit":
        """A tensor, whose codes may be stored as any dtype."""
        _require_state(codes, state)

        def absmax() -> torch.Tensor:
            return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax

        return cls(
            tuple(state.shape),
            (state.quant_type, state.blocksize),
            absmax,
            lambda first, last: read_range(codes.file, codes.start + first, codes.start + last),
        )

    def same_bytes(self, first: int, last: int, other: "FourBit", at: int) -> bool:
        """Whether codes and absmax of the values from number `first` to `last` are those of `other` from number `at` on.

        Then the values are the same, whatever a code stands for. False says nothing: blocks may begin at other values.
        """
        _, block = self.blocks
        if self.blocks != other.blocks or first % block or at % block:
            return False
        codes, absmax = self._codes_and_absmax(first, last)
        other_codes, other_absmax = other._codes_and_absmax(at, at + last - first)
        return np.array_equal(codes, other_codes) and torch.equal(absmax, other_absmax)

    def read(self, first: int, last: int) -> torch.Tensor:
        quant_type, block = self.blocks
        begin = first // block * block
        codes, absmax = self._codes_and_absmax(begin, last)
        # One row: bitsandbytes' CPU kernel would begin a new block with each row, also where rows are not whole blocks.
        state = bnb.QuantState(
            absmax=absmax,
            shape=torch.Size([1, last - begin]),
            dtype=torch.float32,
            blocksize=block,
            quant_type=quant_type,
        )
        return bnb.dequantize_4bit(torch.from_numpy(codes).view(-1, 1), state).view(-1)[first - begin :]

    def _codes_and_absmax(self, first: int, last: int) -> tuple[np.ndarray, torch.Tensor]:
        """Those of the values from number `first`, with which a block begins, to `last`."""
        _, block = self.blocks
        return self._codes(first // 2, -(-last // 2)), self._absmax[first // block : -(-last // block)]


class TurnedFourBit:
    """Experts of the result whose blocks run along the outputs. Their codes lie in rows of outputs, [experts, out, in / 2].

    absmax is float32 [experts, out / blocksize, in]. The state is that of the weights as bitsandbytes would store them,
    [experts, in, out]: once codes and absmax are turned back, it reads them.
    """

    def __init__(self, codes: TensorInfo, state: bnb.QuantState):
        _require_state(codes, state)
        experts, columns, rows = state.shape
        self.shape = (experts, rows, columns)
        self.blocks = (state.quant_type, state.blocksize)
        self._codes, self._absmax = codes, state.absmax.view(experts, -1, columns)

    def expert(self, number: int) -> FourBit:
        """One expert in bitsandbytes' order, [in, out]."""
        _, rows, columns = self.shape
        size = rows * columns // 2
        start = self._codes.start + number * size
        codes = read_range(self._codes.file, start, start + size).reshape(rows, columns // 2)
        by_output = np.empty((rows, columns), np.uint8)  # a code in each byte
        by_output[:, 0::2], by_output[:, 1::2] = codes >> 4, codes & 15
        by_input = by_output.T
        turned = (by_input[:, 0::2] << 4 | by_input[:, 1::2]).reshape(-1)
        absmax = self._absmax[number].T.reshape(-1)
        return FourBit((columns, rows), self.blocks, lambda: absmax, lambda first, last: turned[first:last])


def _require_state(codes: TensorInfo, state: bnb.QuantState) -> None:
    """UserError where `codes` are not as many as the state says, or not of bitsandbytes' codebook."""
    if codes.bytes != -(-prod(state.shape) // 2):
        raise _unreadable(codes.name, f"{codes.bytes} bytes", f"half a byte for each weight of {list(state.shape)}")
    if not torch.equal(state.code, bnb.get_4bit_type(state.quant_type, device="cpu")):
        raise _unreadable(f"{codes.name}.quant_map", "other values", f"bitsandbytes' {state.quant_type} codebook")


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
    def as_stored(self) -> "Matrix":
        """The same values, row by row as they are stored: the transpose of a matrix that is stored transposed."""
        return Matrix(self.name, self.values, self.start, self.shape[::-1]) if self.transposed else self

    @property
    def rows_at_a_time(self) -> int:
        """An even number: rows of gate and up come in pairs."""
        return self.rows if self.transposed else max(2, PIECE_VALUES // self.columns // 2 * 2)

    def same_bytes(self, first: int, last: int, other: "Matrix", at: int) -> bool:
        """`FourBit.same_bytes` for the rows from number `first` to `last`, and those of `other` from `at` on."""
        if self.transposed or not (isinstance(self.values, FourBit) and isinstance(other.values, FourBit)):
            return False
        start, stop = (self.start + row * self.columns for row in (first, last))
        return self.values.same_bytes(start, stop, other.values, other.start + at * self.columns)

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

    def state(self, name: str) -> bnb.QuantState:
        """bitsandbytes' state of 4-bit tensor `name`. UserError where bitsandbytes cannot read it."""
        beside = with_sidecars(name, self.stored)[1:]
        tensors = {each: self._whole(self.stored[each]) for each in beside}
        try:
            return bnb.QuantState.from_dict(tensors, device=torch.device("cpu"))
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {first_line(error)}"
            raise _unreadable(name, got, "a quantization state that bitsandbytes reads") from None

    def values(self, name: str) -> Values:
        return FourBit.stored(self.stored[name], self.state(name)) if self.four_bit(name) else Dense(self.stored[name])

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

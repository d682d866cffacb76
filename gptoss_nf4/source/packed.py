"""A 4-bit tensor as bitsandbytes stores it: codes, and sidecars beside them.

Beside the tensor `W` lie `W.absmax`, `W.quant_map`, `W.quant_state.bitsandbytes__nf4` and, with double quantization,
`W.nested_absmax` and `W.nested_quant_map`. The codes are bytes, whatever dtype they are stored as: `bnb_4bit_quant_storage`
lets FSDP keep them as bfloat16 or another (bitsandbytes 0.50 `quantize_4bit`: `packed.view(quant_storage)`).
"""

import math
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.errors import COPY_AGAIN, OTHER_CONFIG, UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.codec import CODEBOOKS, denest_absmax, dequantize
from gptoss_nf4.format.dtypes import TORCH_DTYPES
from gptoss_nf4.format.quant_state import MAX_ABSMAX, MAX_STATE_BYTES, QUANT_TYPES, QuantState
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.tensor_reader import TensorInfo

if TYPE_CHECKING:
    import torch

STORAGE_DTYPES = frozenset(TORCH_DTYPES)
PIECE_ELEMENTS = 1 << 22  # a multiple of every blocksize; 16 MiB in float32
# Largest distance between neighbours of bitsandbytes' dynamic 8-bit map, whose values go up to 1. Rounding to that map may
# bring an absmax this much of its nested absmax below 0.
NESTED_ROUNDING = 0.02
# What config.json counts, and how the names of one of them begin.
_COUNTED = {"num_local_experts": r".*\.experts\.\w+\.\d+\.", "num_hidden_layers": r"model\.layers\.\d+\."}


class Packed:
    """The 4-bit tensor `name` of `checkpoint`. `find` makes one; nothing but the state is read until it is asked for."""

    def __init__(self, checkpoint: Checkpoint, name: str, state: QuantState):
        self.name, self.state = name, state
        self._checkpoint = checkpoint

    @classmethod
    def find(cls, checkpoint: Checkpoint, name: str) -> "Packed | None":
        """The tensor, if a quantization state lies beside it, else None. UserError for a damaged state."""
        keys = (f"{name}.{names.STATE_PREFIX}{kind}" for kind in QUANT_TYPES)
        key = next((key for key in keys if key in checkpoint.tensors), None)
        if key is None:
            return None
        info = checkpoint.tensors[key]
        if info.bytes > MAX_STATE_BYTES:  # before it is read
            raise UserError(
                "bad quantization state",
                where=key,
                got=f"{info.bytes} bytes",
                expected="a few hundred bytes of JSON",
                next_step=COPY_AGAIN,
            )
        return cls(checkpoint, name, QuantState.from_json(checkpoint.raw(key).tobytes(), key))

    @property
    def stored(self) -> dict[str, str]:
        """Stored names by kind: "weight", "absmax", "quant_map", "quant_state" and perhaps the two nested ones."""
        kinds = (*names.SIDECARS, *(names.NESTED_SIDECARS if self.state.nested else ()))
        return {
            "weight": self.name,
            **{kind: f"{self.name}.{kind}" for kind in kinds},
            "quant_state": f"{self.name}.{names.STATE_PREFIX}{self.state.quant_type}",
        }

    def codes(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The codes of elements `first` to `last`, both even: uint8 [(last - first) / 2]. All of them by default."""
        end = self.state.elements if last is None else last
        return self._checkpoint.raw(self.name, first // 2, end // 2)

    def absmax(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """absmax of blocks `first` to `last`, float32 [last - first], after undoing double quantization."""
        end = self.state.blocks if last is None else last
        if self.state.nested is None:
            return self._checkpoint.raw(f"{self.name}.absmax", 4 * first, 4 * end).view(np.float32)
        size = self.state.nested.blocksize
        begin = first // size * size  # where a nested block begins
        values = denest_absmax(
            self._checkpoint.raw(f"{self.name}.absmax", begin, end),
            self._floats("nested_quant_map"),
            self._floats("nested_absmax")[begin // size : -(-end // size)],
            size,
            self.state.nested.offset,
        )
        return values[first - begin :]

    def pieces(self) -> "Iterator[torch.Tensor]":
        """The weights in order, dequantized: flat float32 tensors of at most PIECE_ELEMENTS."""
        import torch

        codebook, size = CODEBOOKS[self.state.quant_type], self.state.blocksize
        for first in range(0, self.state.elements, PIECE_ELEMENTS):
            last = min(first + PIECE_ELEMENTS, self.state.elements)
            absmax = self.absmax(first // size, -(-last // size))
            yield torch.from_numpy(dequantize(self.codes(first, last), absmax, codebook, size, (last - first,)))

    def validate(self, shape: tuple[int, ...]) -> set[str]:
        """Check the tensor and its sidecars, and return their stored names. UserError for the first fault."""
        stored, state = self.stored, self.state
        if state.shape != shape:
            raise UserError(
                "wrong shape",
                where=stored["quant_state"],
                got=list(state.shape),
                expected=f"{list(shape)} from config.json",
                next_step=OTHER_CONFIG,
            )
        self._require("weight", STORAGE_DTYPES, size=state.elements // 2)
        self._require("quant_map", {"F32"}, elements=16)
        if state.nested is None:
            self._require("absmax", {"F32"}, elements=state.blocks)
        else:
            self._require("absmax", {"U8"}, elements=state.blocks)
            self._require("nested_quant_map", {"F32"}, elements=256)
            self._require("nested_absmax", {"F32"}, elements=-(-state.blocks // state.nested.blocksize))
        if not np.array_equal(self._floats("quant_map"), CODEBOOKS[state.quant_type]):
            raise UserError(
                "foreign codebook",
                where=stored["quant_map"],
                got="other values than bitsandbytes' own",
                expected=f"the {state.quant_type} codebook, which every kernel has built in",
                next_step="save it with bitsandbytes' own codebook",
            )
        rounding = self._require_nested_scales() if state.nested else 0.0
        self._require_values("absmax", self.absmax(), -rounding, MAX_ABSMAX)
        return set(stored.values())

    def _require(self, kind: str, dtypes: Collection[str], elements: int = 0, size: int = 0) -> None:
        """Check that the tensor of that kind is there, in one of `dtypes` and with `elements`, or else `size` bytes."""
        info = require_tensor(self._checkpoint, self.stored[kind])
        if info.dtype not in dtypes or (math.prod(info.shape) != elements if elements else info.bytes != size):
            raise UserError(
                "wrong tensor",
                where=info.name,
                got=f"{info.dtype} {list(info.shape)}",
                expected=f"{' or '.join(sorted(dtypes))} with {f'{elements} elements' if elements else f'{size} bytes'}",
                next_step=COPY_AGAIN,
            )

    def _require_nested_scales(self) -> float:
        """Check what absmax is computed from. Returns how far below 0 rounding may bring an absmax."""
        self._require_values("nested_quant_map", self._floats("nested_quant_map"), -1, 1, rising=True)
        values = self._floats("nested_absmax")
        self._require_values("nested_absmax", values, 0, MAX_ABSMAX)
        return NESTED_ROUNDING * float(values.max())

    def _floats(self, kind: str) -> np.ndarray:
        """A float32 sidecar, flat."""
        return self._checkpoint.raw(f"{self.name}.{kind}").view(np.float32)

    def _require_values(self, kind: str, values: np.ndarray, smallest: float, largest: float, rising: bool = False) -> None:
        got = float(values.min()), float(values.max())  # NaN if any is
        if not (smallest <= got[0] and got[1] <= largest) or (rising and (np.diff(values) < 0).any()):
            raise UserError(
                "bad absmax",
                where=self.stored[kind],
                got=f"values from {got[0]:g} to {got[1]:g}",
                expected=f"{'rising' if rising else 'finite'} values from {smallest:g} to {largest:g}",
                next_step=COPY_AGAIN,
            )


def require_tensor(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """Where the tensor lies. UserError if there is none of that name."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise UserError(
            "missing tensor",
            where=checkpoint.directory,
            got=f"no {name}",
            expected="this tensor in one of the files",
            next_step=_instead_of(checkpoint, name),
        )
    return info


def _instead_of(checkpoint: Checkpoint, name: str) -> str:
    """The next step where the tensor `name` is not there: it may have another name, or config.json may count too many."""
    tail, letters = f".{name.removeprefix('model.')}", re.sub(r"[._]", "", name)
    for other in checkpoint.tensors:
        if f".{other}".endswith(tail) or re.sub(r"[._]", "", other) == letters:
            return f"there is {other}: rename the tensors to the names that transformers gives them"
    for key, pattern in _COUNTED.items():
        begin = re.match(pattern, name)
        if begin and not any(other.startswith(begin[0]) for other in checkpoint.tensors):
            return f"{COPY_AGAIN}; or correct {key} in config.json, since nothing here begins with {begin[0]}"
    return COPY_AGAIN


def require_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> set[str]:
    """Check one tensor of logical `shape`, 4-bit or floating, and return the stored names of all that belongs to it."""
    packed = Packed.find(checkpoint, name)
    if packed is not None:
        return packed.validate(shape)
    info = require_tensor(checkpoint, name)
    sidecars = [key for key in (f"{name}.{kind}" for kind in names.SIDECARS) if key in checkpoint.tensors]
    if sidecars or (info.dtype in STORAGE_DTYPES and info.shape != shape and 2 * info.bytes == math.prod(shape)):
        raise UserError(
            "4-bit codes without a quantization state",
            where=name,
            got=f"{info.dtype} {list(info.shape)}{f' and {sidecars[0]}' if sidecars else ', no absmax'}",
            expected=f"{name}.{names.STATE_PREFIX}nf4 beside it",
            next_step="the weights cannot be recovered from this file; save the fine-tune again, or copy it again",
        )
    if not info.floating or info.shape != shape:
        raise UserError(
            "wrong tensor",
            where=name,
            got=f"{info.dtype} {list(info.shape)}",
            expected=f"a floating dtype {list(shape)}",
            next_step=OTHER_CONFIG,
        )
    return {name}

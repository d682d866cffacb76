"""bitsandbytes' quantization state of one weight, as stored beside it.

The small fields are one JSON object in a uint8 tensor (bitsandbytes 0.50 `utils.pack_dict_to_tensor`): they are read and
written here. The large fields are tensors of their own: absmax, quant_map and, with double quantization, nested_absmax
and nested_quant_map.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss_nf4.errors import COPY_AGAIN, UserError
from gptoss_nf4.format.dtypes import DTYPES

QUANT_TYPES = ("nf4", "fp4")
MAX_ABSMAX = 65504.0  # float16's largest number: a weight beyond it could not be served in float16
FIELDS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
MAX_DIMENSIONS = 8  # no weight has more than three; Python does not print the product of thousands of large numbers
MAX_STATE_BYTES = 1 << 16  # bitsandbytes writes some 200
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes 0.50 `dequantize_4bit`


@dataclass(frozen=True)
class Nested:
    """Double quantization of absmax: one float32 scale for each `blocksize` absmax bytes, and one offset for all."""

    blocksize: int
    offset: float


@dataclass(frozen=True)
class QuantState:
    """How a 4-bit weight is to be read.

    `shape` is the weight's logical one. `blocksize` is in weights. bitsandbytes dequantizes to `dtype` unless told
    otherwise. `nested` is None where absmax is stored in float32.
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested: Nested | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.elements // self.blocksize)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "QuantState":
        """Parse the JSON of a `quant_state.bitsandbytes__*` tensor. UserError names `where`, the tensor, and the field."""

        def bad(got: object, expected: str) -> UserError:
            return UserError("bad quantization state", where=where, got=got, expected=expected, next_step=COPY_AGAIN)

        try:
            fields = json.loads(data.decode())  # from bytes, json.loads would also take UTF-16
        except (ValueError, RecursionError) as error:
            raise bad(f"text that is not JSON ({error})", "a JSON object") from None
        if not isinstance(fields, dict):
            raise bad(type(fields).__name__, "a JSON object")
        if unknown := sorted(fields.keys() - FIELDS):  # bitsandbytes does not read such a state
            raise bad(f"the field {unknown[0][:40]!r}", f"only {', '.join(FIELDS)}")

        def number(key: str, kinds: tuple[type, ...] = (int,)) -> Any:
            value: Any = fields.get(key)
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if not is_number or not abs(value) < 2**53:
                raise bad(f"{key}={str(value)[:40]!r}", "a finite number")
            return value

        shape = fields.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**40 for n in shape[: MAX_DIMENSIONS + 1]):
            raise bad(f"shape={str(shape)[:40]!r}", "a list of positive whole numbers")
        if len(shape) > MAX_DIMENSIONS:
            raise bad(f"shape={str(shape)[:40]!r}", f"at most {MAX_DIMENSIONS} dimensions")
        if fields.get("quant_type") not in QUANT_TYPES:
            raise bad(f"quant_type={fields.get('quant_type')!r}", " or ".join(QUANT_TYPES))
        if fields.get("dtype") not in DTYPES:
            raise bad(f"dtype={fields.get('dtype')!r}", " or ".join(DTYPES))
        if number("blocksize") not in BLOCKSIZES:
            raise bad(f"blocksize={fields['blocksize']}", f"one of {BLOCKSIZES}")
        nested = None
        if "nested_blocksize" in fields:
            if fields.get("nested_dtype") != "float32":
                raise bad(f"nested_dtype={fields.get('nested_dtype')!r}", "float32")
            if number("nested_blocksize") not in BLOCKSIZES:
                raise bad(f"nested_blocksize={fields['nested_blocksize']}", f"one of {BLOCKSIZES}")
            nested = Nested(number("nested_blocksize"), float(number("nested_offset", (int, float))))
        return cls(fields["quant_type"], fields["blocksize"], fields["dtype"], tuple(shape), nested)

    def to_json(self) -> np.ndarray:
        """The JSON bytes, uint8 [n], as bitsandbytes packs them. Only for states without nesting: we write no others."""
        if self.nested is not None:
            raise ValueError("a nested state is only ever read")
        fields = {"quant_type": self.quant_type, "blocksize": self.blocksize, "dtype": self.dtype, "shape": self.shape}
        return np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)

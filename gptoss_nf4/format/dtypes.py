"""Names of dtypes: config.json, safetensors headers, NumPy and torch each have their own."""

import numpy as np

from gptoss_nf4.errors import UserError

# The dtypes that a converted checkpoint may have, by the names of config.json and torch.
DTYPES = ("float16", "bfloat16", "float32")
# The same dtypes by their names in a safetensors header.
SAFETENSORS_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

# These tables go by the name in a safetensors header.
ITEM_BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
# Known so that they can be named.
ITEM_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
NUMPY_DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "F64": np.float64}  # NumPy has no bfloat16
TORCH_DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
TORCH_DTYPES |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}  # in which 4-bit codes may be stored, too
FLOATING = frozenset({"F16", "BF16", "F32", "F64"})


def check_dtype(dtype: str) -> str:
    """Return `dtype` if a checkpoint can be converted to it. UserError otherwise."""
    if dtype not in DTYPES:
        raise UserError(
            "bad setting", where="dtype", got=repr(dtype), expected=f"one of {DTYPES}", next_step="pass dtype=float16"
        )
    return dtype

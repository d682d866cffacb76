"""Triton's interpreter at a third of its cost: what a kernel computes, and what is checked of it, stays the same.

Most of the time goes into the interpreter's own work around each operation and each call, however few elements there are.
Imported by the scripts that have chosen the interpreter, `TRITON_INTERPRET=1`, before they run a kernel.
"""

from dataclasses import replace
from types import FunctionType, SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def leave_out_discarded_checks() -> None:
    """Sums and products of integers are made again in 64 bits and compared; without `debug` nobody reads the result."""
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def patch_the_language_once() -> None:
    """For each launch, and not for each call of a function within: `tl` stays patched until the launch has ended."""
    patch, scopes = interpreter._patch_lang, []
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # whatever a function within may import

    def patch_once(function: FunctionType) -> interpreter._LangPatchScope:
        if scopes and scopes[-1]._changes:
            return interpreter._LangPatchScope()
        scopes[:] = [patch(whole)]
        return scopes[-1]

    interpreter._patch_lang = patch_once


def remember_numpy_types() -> None:
    """Else a dictionary of all types is made each time that one is asked for."""
    make, known = interpreter._get_np_dtype, {}

    def remembered(dtype: tl.dtype) -> np.dtype:
        if dtype.name not in known:
            known[dtype.name] = make(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered


def share_types_of_blocks() -> None:
    """One object for each element type and shape, and what a tensor has of its type is made once: operations make many."""
    make_type, make_tensor, known = tl.block_type.__init__, tl.tensor.__init__, {}

    def shared(cls: type, element_ty: tl.dtype, shape: list) -> tl.block_type:
        key = id(element_ty), *(each.value if isinstance(each, tl.constexpr) else each for each in shape)
        if key not in known:
            made = object.__new__(cls)
            make_type(made, element_ty, shape)  # keeps the element type, and so its id
            known[key] = made
        return known[key]

    def of_type(tensor: tl.tensor, handle: interpreter.TensorHandle, dtype: tl.dtype) -> None:
        if "first" in dtype.__dict__:
            tensor.__dict__.update(dtype.first, handle=handle)
        else:
            make_tensor(tensor, handle, dtype)
            dtype.first = {name: value for name, value in tensor.__dict__.items() if name != "handle"}

    tl.block_type.__new__ = shared
    tl.block_type.__init__ = lambda *_: None
    tl.tensor.__init__ = of_type


leave_out_discarded_checks()
patch_the_language_once()
remember_numpy_types()
share_types_of_blocks()

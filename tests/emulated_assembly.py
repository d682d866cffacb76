"""Lets Triton's interpreter run inline assembly, by the emulator `ptx`."""

from dataclasses import dataclass

import numpy as np
import ptx
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@dataclass
class Assembly:
    """What ran, and the shared memory of the program."""

    ran: int = 0
    shared: ptx.Shared | None = None

    def run(
        self, text: str, constraints: str, values: list[TensorHandle], types: list[tl.dtype], is_pure: bool, pack: int
    ) -> "Results":
        if text.startswith(".shared"):  # a program declares its memory once, in front of all uses
            self.shared = ptx.Shared()
        shape = np.broadcast_shapes(*(value.data.shape for value in values)) if values else (1,)
        inputs = [value.data for value in values]
        if pack == 2:  # two neighbours of 16 bits in a register
            inputs = [np.ascontiguousarray(np.broadcast_to(each, shape)).view(np.uint32) for each in inputs]
            shape = inputs[0].shape
        outputs = ptx.run(text, constraints, inputs, self.shared)
        self.ran += 1
        handles = []
        for output, kind in zip(outputs, types, strict=True):
            bits = np.broadcast_to(output, shape).copy()
            handles.append(TensorHandle(bits.view(_numpy_type(kind.scalar)), kind.scalar))
        return Results(handles)


def _numpy_type(kind: tl.dtype) -> type:
    """As which Triton's interpreter keeps it."""
    if kind.primitive_bitwidth == 16:
        return np.float16 if kind.is_fp16() else np.uint16
    return np.int32 if kind.is_int_signed() else np.uint32


@dataclass
class Results:
    handles: list[TensorHandle]

    def get_result(self, place: int) -> TensorHandle:
        return self.handles[place]


def emulate() -> Assembly:
    """From now on `tl.inline_asm_elementwise` runs in interpreted kernels. The result counts how often."""
    assembly = Assembly()
    InterpreterBuilder.create_inline_asm = lambda _, *arguments: assembly.run(*arguments)
    return assembly

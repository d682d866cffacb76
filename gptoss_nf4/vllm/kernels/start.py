"""Starting a kernel without looking at everything again.

At each launch Triton looks at every argument, makes a text of all options, and compares all constants that the kernel reads
of its module, to find what it has compiled. For a kernel that takes tuples that is 30 to 70 us on the host. Decoding does
not notice, since CUDA graphs start it. A prefill starts some 170 kernels one by one, and where it is short the GPU waits.

So `start_kernel` keeps what Triton gave for a launch, and gives it the next one of the same kind itself. Launches of one
kind are the same to Triton; the converse does not hold, since integers count by their value. Whatever is new goes through
Triton. So what Triton is told besides (debugging, instrumentation) counts for the first launch of a kind only.

Sizes are computed here too: on the host Triton's own `cdiv` and `next_power_of_2` take 10 us each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ALIGNED = 16  # bytes; Triton tells pointers by whether they are multiples of it
INT32 = range(-(1 << 31), 1 << 31)

_STARTED: dict[tuple, tuple[CompiledKernel, list[str]]] = {}
"""By the kind of a launch: the kernel, and which of the named arguments it takes, in its order."""
_PARAMETERS: dict[int, tuple[frozenset[str], frozenset[str]]] = {}
"""By the kernel's `id`: names of what it takes when it runs, and of those the integers that are not specialized."""
_all_through_triton = False


def start_kernel(function: JITFunction, grid: tuple[int, ...], *arguments: object, **named: object) -> None:
    """`function[grid](*arguments, **named)`, in less time from the second launch of a kind on.

    Args:
        arguments: the first ones of the kernel. named: all others, none left to a default, and Triton's options.
    """
    # Triton's interpreter has functions of its own.
    if _all_through_triton or not isinstance(function, JITFunction) or function.pre_run_hooks:
        function[grid](*arguments, **named)
        return
    kind = driver.active.get_current_device(), *kind_of(function, arguments, named)
    known = _STARTED.get(kind)
    if known is not None:
        kernel, names = known
        kernel[*grid, *(1,) * (3 - len(grid))](*arguments, *[named[name] for name in names])
        return
    kernel = function[grid](*arguments, **named)
    if isinstance(kernel, CompiledKernel):
        _STARTED[kind] = kernel, function.arg_names[len(arguments) :]


@contextmanager
def through_triton() -> Iterator[None]:
    """All launches of this process go through Triton, as if none had been before."""
    global _all_through_triton
    _all_through_triton = True
    try:
        yield
    finally:
        _all_through_triton = False


def kind_of(function: JITFunction, arguments: Sequence, named: dict) -> tuple:
    """What stands for a launch, as `start_kernel` takes it. Equal ones are the same to Triton on one device."""
    known = _PARAMETERS.get(id(function))
    at_run, free = known if known is not None else _parameters(function)
    kind: list[object] = [id(function), *named]
    for name, value in chain(zip(function.arg_names, arguments, strict=False), named.items()):
        if name in free and type(value) is int and value in INT32:
            kind.append(None)
        elif name in at_run:
            kind.append(_at_run(value))
        else:
            kind.append(_constant(value))
    return tuple(kind)


def _at_run(value: object) -> object:
    """Of an argument that the kernel takes when it runs: of a tensor its dtype and alignment, of a tuple its elements."""
    its_type = type(value)
    if its_type is int or value is None:
        return value
    if its_type is float:
        return float
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % ALIGNED
    if isinstance(value, tuple):
        return tuple([_at_run(each) for each in value])
    if isinstance(value, tl.constexpr):
        return tl.constexpr, _constant(value.value)
    return its_type, value


def _constant(value: object) -> object:
    return (bool, value) if type(value) is bool else value  # True is equal to 1


def _parameters(function: JITFunction) -> tuple[frozenset[str], frozenset[str]]:
    at_run = [parameter for parameter in function.params if not parameter.is_constexpr]
    free = frozenset(parameter.name for parameter in at_run if parameter.do_not_specialize)
    return _PARAMETERS.setdefault(id(function), (frozenset(parameter.name for parameter in at_run), free))


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()

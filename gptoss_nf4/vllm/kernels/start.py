"""Starting a kernel without looking at everything again.

At each launch Triton looks at every argument, makes a text of all options, and compares all constants that the kernel reads
of its module, to find what it has compiled. For a kernel that takes tuples that is 30 to 70 us on the host. Decoding does
not notice, since CUDA graphs start it. A prefill starts some 200 kernels one by one, and where it is short the GPU waits.

So `start_kernel` keeps what Triton gave for a launch, and gives it the next one of the same kind itself. Two launches are
of one kind where Triton cannot tell them apart, see `_kind`. Whatever is new goes through Triton.

Sizes are computed here too: on the host Triton's own `cdiv` and `next_power_of_2` take 10 us each.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

ALIGNED = 16  # bytes; Triton tells pointers by whether they are multiples of it
FIRST_OF_64_BITS = 1 << 31
PLAIN = (int, bool, str, type(None))

_STARTED: dict[tuple, tuple[CompiledKernel, list[str]]] = {}
"""By the kind of a launch: the kernel, and which of the named arguments it takes, in its order."""
_NOT_SPECIALIZED: dict[int, frozenset[str]] = {}
"""By the kernel's `id`: names of integers of which Triton only asks whether they have 32 bits."""


def start_kernel(function: JITFunction, grid: tuple[int, ...], *arguments: object, **named: object) -> None:
    """`function[grid](*arguments, **named)`, in less time from the second launch of a kind on.

    Args:
        arguments: the first ones of the kernel. named: all others, and Triton's options.
    """
    if not isinstance(function, JITFunction):  # Triton's interpreter
        function[grid](*arguments, **named)
        return
    kind = kind_of(function, arguments, named)
    known = _STARTED.get(kind)
    if known is not None:
        kernel, names = known
        kernel[*grid, *(1,) * (3 - len(grid))](*arguments, *[named[name] for name in names])
        return
    kernel = function[grid](*arguments, **named)
    if isinstance(kernel, CompiledKernel):  # None where launches are only recorded
        _STARTED[kind] = kernel, function.arg_names[len(arguments) :]


def kind_of(function: JITFunction, arguments: Sequence, named: dict) -> tuple:
    """What stands for a launch, as `start_kernel` takes it, and for all that Triton would start the same way."""
    free = _NOT_SPECIALIZED.get(id(function)) or _not_specialized(function)
    return (
        id(function),
        tuple([_kind(value) for value in arguments]),
        *named,
        *[value < FIRST_OF_64_BITS if name in free else _kind(value) for name, value in named.items()],
    )


def _kind(value: object) -> object:
    """What Triton tells values of an argument by, or more.

    Constants and integers themselves, of a tensor its dtype, device and alignment, of a tuple its elements.
    """
    its_type = type(value)
    if its_type in PLAIN:
        return value
    if its_type is float:
        return float
    if isinstance(value, tl.constexpr):
        return value.value
    if isinstance(value, torch.Tensor):
        return value.dtype, value.get_device(), value.data_ptr() % ALIGNED
    if isinstance(value, tuple):
        return tuple([_kind(each) for each in value])
    return value


def _not_specialized(function: JITFunction) -> frozenset[str]:
    names = frozenset(parameter.name for parameter in function.params if parameter.do_not_specialize)
    return _NOT_SPECIALIZED.setdefault(id(function), names)


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, of 1 or more."""
    return 1 << (size - 1).bit_length()

"""Which kernels a product starts, as which variants, and compiling them before anybody waits for them.

Triton compiles a kernel anew for other dtypes, constants, options, and for integers that become divisible by 16 or equal
to 1. So what depends on the step (the number of tokens) is never specialized (`do_not_specialize`), or is a constant of few
values. Then finitely many variants remain. They are found by starting a product on tensors without memory (`recorded`), and
compiled in parallel (`compiled`).
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime._async_compile import FutureKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gptoss_nf4.vllm.kernels.start import kind_of, through_triton

META = torch.device("meta")


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was started with, tensors on the meta device."""

    function: JITFunction
    arguments: dict
    grid: tuple[int, ...]

    @property
    def kernel(self) -> str:
        """Module and name."""
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches of this process instead of making them."""
    launches: list[Launch] = []

    def record(function: JITFunction, *arguments: object, grid: tuple, warmup: bool, **named: object) -> None:
        launches.append(Launch(function, dict(zip(function.arg_names, arguments, strict=False)) | named, grid))

    run = JITFunction.run
    JITFunction.run = record
    try:
        with through_triton():
            yield launches
    finally:
        JITFunction.run = run


def variants(start: Callable[[int], object], most_tokens: int) -> list[Launch]:
    """One launch of every variant that `start(tokens)` makes on meta tensors, for 1 to `most_tokens` tokens.

    Constants change at some numbers of tokens only, and each moves in one direction between two powers of two. So where
    both ends of a range start the same variants, all between them do; else the range is halved.
    """
    found: dict[tuple, Launch] = {}
    kinds_of: dict[int, frozenset[tuple]] = {}

    def kinds(tokens: int) -> frozenset[tuple]:
        if tokens not in kinds_of:
            with recorded() as launches:
                start(tokens)
            by_kind = {kind_of(launch.function, (), launch.arguments): launch for launch in launches}
            found.update(by_kind)
            kinds_of[tokens] = frozenset(by_kind)
        return kinds_of[tokens]

    def halve(low: int, high: int) -> None:
        if high - low > 1 and kinds(low) != kinds(high):
            middle = (low + high) // 2
            halve(low, middle)
            halve(middle, high)

    powers = [1 << exponent for exponent in range(most_tokens.bit_length())]
    ends = sorted({end for power in powers for end in (power, power + 1) if end <= most_tokens} | {most_tokens})
    for end in ends:
        kinds(end)
    for low, high in pairwise(ends):
        halve(low, high)
    return list(found.values())


def compiled(launches: list[Launch]) -> list[CompiledKernel]:
    """The launches as Triton compiles them for the current device, in parallel. It finds them again when they are made.

    Raises what Triton raises for the first that cannot be compiled.
    """
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    # An error would leave Triton 3.7's mode behind: they are passed over here.
    with threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        kernels = [launch.function.warmup(**launch.arguments, grid=(1,)) for launch in launches]
    return [_finished(launch, kernel) for launch, kernel in zip(launches, kernels, strict=True)]


def _finished(launch: Launch, kernel: CompiledKernel | FutureKernel) -> CompiledKernel:
    """What became of a launch's compilation. One that failed is made again, alone, and raises its error.

    Threads may disturb each other: Python 3.11's parser then says "AST constructor recursion depth mismatch", of nothing
    that is wrong with a kernel.
    """
    if not isinstance(kernel, FutureKernel):
        return kernel
    if kernel.kernel is None:
        known = launch.function.device_caches[driver.active.get_current_device()][0]
        for key in [key for key, value in known.items() if value is kernel]:
            del known[key]  # Triton up to 3.7 keeps what failed
        return launch.function.warmup(**launch.arguments, grid=(1,))
    return kernel.kernel

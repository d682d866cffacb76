"""What Triton would compile for a GPU that need not be here, by its own keys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.machine_code import AbsentDriver
from gptoss_nf4.vllm.kernels.variants import Launch


class AskedDriver(AbsentDriver):
    """Its kernels are kept apart from those that other tests compile: of a kernel that is there Triton asks nothing."""

    def get_current_device(self) -> str:
        return f"asked sm_{self.capability}"


@contextmanager
def nothing_compiled(here: AbsentDriver, note: Callable[[JITFunction, str, str], None]) -> Iterator[None]:
    """`note` gets what Triton would compile for the GPU of `here`: the kernel, Triton's key, and the key with its name."""

    def done(*, key: str, fn: object, **_: object) -> bool:
        note(fn.jit_function, key, f"{fn.module}.{fn.name} {key}")
        return True

    runtime = triton.knobs.runtime
    with mock.patch.object(driver, "_active", here), mock.patch.object(runtime, "jit_cache_hook", done):
        yield


@contextmanager
def asked_of_triton(capability: int) -> Iterator[list[str]]:
    """What it would compile, by its own keys, launch by launch."""
    keys: list[str] = []
    with nothing_compiled(AskedDriver(capability), lambda kernel, key, named: keys.append(named)):
        yield keys


class KnownDriver(AbsentDriver):
    """Here Triton finds keys in place of kernels."""

    def get_current_device(self) -> str:
        return f"known sm_{self.capability}"


def keys_of(found: list[Launch], capability: int) -> list[str]:
    """Triton's own key of each launch, by which it looks for a kernel: it finds the key, or would compile and leaves it.

    So only of new ones, a few in a hundred, all is worked out that a compiler would want to know.
    """
    here = KnownDriver(capability)

    def leave(kernel: JITFunction, key: str, named: str) -> None:
        kernel.device_caches[here.get_current_device()][0][key] = named

    with nothing_compiled(here, leave):
        return [
            launch.function.warmup(**launch.arguments, grid=(1,)) or launch.function.warmup(**launch.arguments, grid=(1,))
            for launch in found
        ]

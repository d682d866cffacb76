"""What Triton would compile for a GPU that need not be here, by its own keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import triton
from triton.runtime.driver import driver

from benchmarks.machine_code import AbsentDriver
from gptoss_nf4.vllm.kernels.variants import Launch


class AskedDriver(AbsentDriver):
    """Its kernels are kept apart from those that other tests compile: of a kernel that is there Triton asks nothing."""

    def get_current_device(self) -> str:
        return f"asked sm_{self.capability}"


@contextmanager
def asked_of_triton(capability: int) -> Iterator[list[str]]:
    """What it would compile, by its own keys, launch by launch; it does not, since the hook says that it is done."""
    keys: list[str] = []
    runtime = triton.knobs.runtime

    def hook(*, key: object, fn: object, **_: object) -> bool:
        keys.append(f"{fn.module}.{fn.name} {key}")
        return True

    before, runtime.jit_cache_hook = runtime.jit_cache_hook, hook
    try:
        with mock.patch.object(driver, "_active", AskedDriver(capability)):
            yield keys
    finally:
        runtime.jit_cache_hook = before


class KnownDriver(AbsentDriver):
    """Here Triton finds keys in place of kernels."""

    def get_current_device(self) -> str:
        return f"known sm_{self.capability}"


def keys_of(found: list[Launch], capability: int) -> list[str]:
    """Triton's own key of each launch, by which it looks for a kernel. It finds the key, or asks the hook, which leaves it.

    So only of new ones, a few in a hundred, all is worked out that a compiler would want to know.
    """
    here, runtime = KnownDriver(capability), triton.knobs.runtime

    def hook(*, key: object, fn: object, **_: object) -> bool:
        fn.jit_function.device_caches[here.get_current_device()][0][key] = f"{fn.module}.{fn.name} {key}"
        return True

    before, runtime.jit_cache_hook = runtime.jit_cache_hook, hook
    try:
        with mock.patch.object(driver, "_active", here):
            return [
                launch.function.warmup(**launch.arguments, grid=(1,))
                or launch.function.warmup(**launch.arguments, grid=(1,))
                for launch in found
            ]
    finally:
        runtime.jit_cache_hook = before

"""What Triton would compile for a GPU that need not be here, by its own keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import triton
from triton.runtime.driver import driver

from benchmarks.machine_code import AbsentDriver


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

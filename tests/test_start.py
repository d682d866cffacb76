"""Starting a kernel again: what passes for the same launch, and what is started then."""

from itertools import product
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from asked_triton import asked_of_triton
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.machine_code import AbsentDriver
from gptoss_nf4.vllm.kernels import start
from gptoss_nf4.vllm.kernels.start import cdiv, kind_of, next_power_of_2, start_kernel
from gptoss_nf4.vllm.kernels.variants import recorded


class Several(NamedTuple):
    data: torch.Tensor | None
    size: int
    constant: tl.constexpr


@triton.jit(do_not_specialize=["count"])
def kernel(x, several, scale, size, count, CONSTANT: tl.constexpr):
    pass


def values() -> list[dict]:
    """Arguments of all sorts that Triton tells apart, and of some that it does not."""
    memory = torch.zeros(64, dtype=torch.int16)
    tensors = [memory, torch.zeros(64, dtype=torch.int16), memory[1:], memory[8:], memory.view(torch.float16)]
    sizes = [1, 2, 16, 48, 1 << 31, 1 << 40]
    usual = {
        "x": memory,
        "several": Several(memory, 16, tl.constexpr(4)),
        "scale": 0.5,
        "size": 32,
        "count": 7,
        "CONSTANT": 64,
        "num_warps": 4,
    }
    others = [
        *[{"x": tensor} for tensor in tensors],
        *[{"several": Several(*each)} for each in product([None, *tensors], sizes[:4], map(tl.constexpr, (4, 8)))],
        *[{"scale": scale} for scale in (1.0, 1, 2.5)],
        *[{"size": size} for size in sizes],
        *[{"size": size} for size in (True, False, 0)],
        *[{"count": count} for count in (*sizes, -1, -(1 << 31), -(1 << 31) - 1, 1 << 63, 0.5, True)],
        *[{"several": Several(memory, 4, constant)} for constant in (4, 4.0, tl.constexpr(4), True, tl.constexpr(True))],
        *[{"CONSTANT": constant} for constant in (64, 128, None, True, 1, 0.5, 0.25)],
        {"num_warps": 8},
        {"maxnreg": 80},
    ]
    return [usual, *(usual | other for other in others)]


def test_what_passes_for_the_same_is_the_same_to_triton():
    """Each with each. The keys are Triton's own."""
    with asked_of_triton(86) as keys:
        for arguments in values():
            kernel.warmup(**arguments, grid=(1,))
    kinds = [kind_of(kernel, (), arguments) for arguments in values()]
    assert len(keys) == len(kinds)
    for (kind, key), (other_kind, other_key) in product(zip(kinds, keys, strict=True), repeat=2):
        assert kind != other_kind or key == other_key, (kind, key, other_key)
    assert len(set(keys)) > 40
    assert len(set(kinds)) < len(kinds)  # other memory, another count


@pytest.fixture
def started(monkeypatch):
    """Launches that went through Triton, and those of what it gave."""
    through, again = [], []

    class Compiled(CompiledKernel):
        module = None  # not loaded

        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments: again.append((self.name, grid, arguments))

    def run(function, *arguments, grid, warmup, **named):
        through.append((grid, arguments, named))
        return Compiled(len(through))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(start, "_STARTED", {})
    monkeypatch.setattr(driver, "_active", AbsentDriver(86))
    return through, again


def test_the_second_launch_of_a_kind_goes_to_what_triton_gave(started):
    through, again = started
    x, y = torch.zeros(32), torch.ones(32)
    several = Several(x, 16, tl.constexpr(4))
    named = {"scale": 0.5, "count": 3, "CONSTANT": 64, "size": 32, "num_warps": 4}
    start_kernel(kernel, (3, 2), x, several, **named)
    assert through == [((3, 2), (x, several), named)]
    assert again == []
    start_kernel(kernel, (5,), y, several, **named | {"count": 9, "scale": 0.25})
    assert len(through) == 1
    (number, grid, arguments), *_ = again
    assert (number, grid) == (1, (5, 1, 1))
    assert arguments[0] is y
    assert arguments[1:] == (several, 0.25, 32, 9, 64)  # in the kernel's order, without Triton's options


@pytest.mark.parametrize(
    "changed",
    [{"size": 33}, {"CONSTANT": 128}, {"num_warps": 8}, {"count": 1 << 31}, {"maxnreg": 80}, {"scale": 1}],
    ids=str,
)
def test_another_kind_goes_through_triton(started, changed):
    through, again = started
    named = {"scale": 0.5, "size": 32, "count": 3, "CONSTANT": 64, "num_warps": 4}
    x = torch.zeros(32)
    for each in (named, named | changed, named, named | changed):
        start_kernel(kernel, (1,), x, Several(x, 16, tl.constexpr(4)), **each)
    assert len(through) == 2
    assert [number for number, _, _ in again] == [1, 2]


def test_what_is_only_recorded_is_asked_for_again(started):
    """Whatever has been started before."""
    through, again = started
    arguments = {"scale": 1.0, "size": 1, "count": 1, "CONSTANT": 1}
    x = torch.zeros(4)
    start_kernel(kernel, (1,), x, None, **arguments)
    with recorded() as launches:
        start_kernel(kernel, (1,), x, None, **arguments)
    assert [(launch.function, launch.grid) for launch in launches] == [(kernel, (1,))]
    start_kernel(kernel, (2,), x, None, **arguments)
    assert (len(through), len(again)) == (1, 1)


def test_another_device_has_kernels_of_its_own(started):
    through, again = started
    arguments = {"scale": 1.0, "size": 1, "count": 1, "CONSTANT": 1}
    x = torch.zeros(4)
    for capability in (86, 90, 86, 90):
        with mock.patch.object(driver, "_active", AbsentDriver(capability)):
            start_kernel(kernel, (1,), x, None, **arguments)
    assert len(through) == 2
    assert [number for number, _, _ in again] == [1, 2]


def test_a_hook_of_the_kernel_sees_every_launch(started, monkeypatch):
    through, _ = started
    monkeypatch.setattr(kernel, "pre_run_hooks", [print])
    for _ in range(2):
        start_kernel(kernel, (1,), torch.zeros(4), None, scale=1.0, size=1, count=1, CONSTANT=1)
    assert len(through) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 31, 32, 33, 1023, 1024, 1025, 201088])
def test_sizes_are_tritons(size):
    assert next_power_of_2(size) == triton.next_power_of_2(size)
    assert next_power_of_2(0) == 1
    for block in (1, 2, 16, 64, 1000):
        assert cdiv(size, block) == triton.cdiv(size, block)

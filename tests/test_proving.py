"""Kernels show that they work before a model is served, and what does not work is given up, step by step."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from project_imports import ROOT
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.machine_code import GPUS, AbsentDriver, disassembled
from gptoss_nf4.errors import UserError
from gptoss_nf4.vllm.kernels import plan
from gptoss_nf4.vllm.kernels import shared_memory as shared_memory_module
from gptoss_nf4.vllm.kernels.plan import Decoding, Gpu, gpu_of, settle
from gptoss_nf4.vllm.kernels.shared_memory import declared_bytes, limit, shared_memory
from gptoss_nf4.vllm.kernels.variants import META, Launch, compiled, variants
from gptoss_nf4.vllm.proving import ladder, prepare
from gptoss_nf4.vllm.proving.products import Product

H100 = GPUS[90]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_found():
    """Leave the process's memory of its devices as it was."""
    with mock.patch.dict(plan._GPUS), mock.patch.dict(prepare._working):
        yield


# ---- trials ----


@pytest.mark.slow
def test_trials_pass_where_kernels_are_right_and_fail_where_they_are_wrong():
    """Through Triton's interpreter, in a process of its own, with the default dtype that vLLM sets while it makes layers.

    float32's sums, float16's products: a hundredth of the limit.
    """
    done = subprocess.run([sys.executable, ROOT / "tests" / "proving_cases.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = {result["product"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert len(results) == 15
    for broken in ("a wrong table", "absmax of other inputs", "wrong experts"):
        assert results.pop(broken)["fault"].startswith("wrong results: ")
    for name, result in results.items():
        assert len(result["errors"]) >= (1 if name == "router" else 2)
        assert max(result["errors"].values()) < 0.01, name


# ---- shared memory ----


@triton.jit
def greedy(x, out, STATIC: tl.constexpr, COLUMNS: tl.constexpr):
    """Declares shared memory in inline assembly, and makes Triton allocate some too: a transposition."""
    tl.inline_asm_elementwise(STATIC, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    i, j = tl.arange(0, 64), tl.arange(0, COLUMNS)
    values = tl.load(x + i[:, None] * COLUMNS + j[None, :])
    tl.store(out + j[:, None] * 64 + i[None, :], tl.trans(values))


def greedy_launch(static: int, columns: int) -> Launch:
    x = torch.empty(64, columns, device=META)
    assembly = f".shared .align 16 .b8 greedy_bytes[{static}]; mov.u32 $0, greedy_bytes;"
    return Launch(greedy, {"x": x, "out": x.T, "STATIC": assembly, "COLUMNS": columns, "num_warps": 4}, (1,))


@pytest.mark.parametrize("capability", [86, 90])
def test_declared_shared_memory_is_read_from_the_machine_code(capability):
    with mock.patch.object(driver, "_active", AbsentDriver(capability)):
        (kernel,) = compiled([greedy_launch(20480, 64)])
    takes = shared_memory(kernel)
    assert takes.static == 20480
    assert takes.dynamic == kernel.metadata.shared > 0
    # NVIDIA's own tool, which counts CUDA's own KiB too.
    told = disassembled(kernel, "-res-usage")
    assert f"SHARED:{20480 + (1024 if capability == 90 else 0)}" in told
    assert declared_bytes(kernel.asm["cubin"]) == takes.static + (1024 if capability == 90 else 0)


class FakeDriver:
    """Stands for CUDA's driver API: a kernel with `static` bytes, on a GPU that gives a program 99 KiB."""

    def __init__(self, static: int):
        self.static = static
        self.asked: list[tuple[int, int]] = []

    def cuFuncGetAttribute(self, value, number, handle) -> int:
        value._obj.value = {shared_memory_module.STATIC_BYTES: self.static}[number]
        return 0

    def cuCtxGetDevice(self, device) -> int:
        return 0

    def cuDeviceGetAttribute(self, value, number, device) -> int:
        value._obj.value = {shared_memory_module.MAX_BYTES_OF_A_PROGRAM: 99 * 1024}[number]
        return 0

    def cuFuncSetAttribute(self, handle, number, value) -> int:
        self.asked.append((number, value))
        return 0


@pytest.mark.parametrize(("static", "asked"), [(0, []), (1024, []), (33792, [(8, 99 * 1024 - 33792)])])
def test_a_kernel_that_declares_shared_memory_asks_for_all_that_a_program_can_have(static, asked):
    fake = FakeDriver(static)
    with mock.patch.object(shared_memory_module.ctypes, "CDLL", return_value=fake):
        triton.knobs.runtime.kernel_load_end_hook(None, 1, "linear", {}, "hash")  # as Triton calls it
    assert fake.asked == asked
    assert limit(100 * 1024) == 99 * 1024


@dataclass(frozen=True)
class Fake(Product):
    """A product whose launches are given, and whose trial too."""

    static: int = 1024
    columns: int = 64
    off: float = 0.0
    raises: Exception | None = None
    most_tokens: int = 1

    def start(self, tokens: int) -> None:
        launch = greedy_launch(self.static, self.columns)
        launch.function[(1,)](**launch.arguments)

    def errors(self, device: torch.device) -> Iterator[tuple[str, float]]:
        if self.raises is not None:
            raise self.raises
        yield "a fake", self.off


def test_faults_are_told_in_one_line():
    with mock.patch.object(driver, "_active", AbsentDriver(90)):
        assert ladder.fault(Fake(16384), H100, CPU) is None
        # 64 x 128 float32 are 32 KiB of Triton's.
        assert ladder.fault(Fake(32768, 128), H100, CPU) is None
        told = ladder.fault(Fake(32768, 128), replace(H100, shared_bytes=64 * 1024), CPU)
        assert told is not None
        assert "takes 32768 bytes of shared memory and Triton's 32" in told
        assert told.endswith("of 64512 that CUDA gives")
        assert ladder.fault(Fake(off=0.5), H100, CPU) == "wrong results: a fake, off by 0.5 times their size"
        assert ladder.fault(Fake(off=float("nan")), H100, CPU) == "wrong results: a fake, off by nan times their size"
        error = RuntimeError("Triton Error [CUDA]: invalid\nargument")
        assert ladder.fault(Fake(raises=error), H100, CPU) == (
            "a kernel does not run (RuntimeError: Triton Error [CUDA]: invalid argument)"
        )
        assert ladder.fault(Fake(static=1 << 30), H100, CPU).startswith("a kernel does not compile (")


def test_a_gpu_that_is_lost_to_the_process_is_one_clear_error():
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with (
        mock.patch.object(driver, "_active", AbsentDriver(90)),
        mock.patch.object(ladder, "_wait", side_effect=broken),
        pytest.raises(UserError, match="GPTOSS_NF4_DECODING=permutes"),
    ):
        ladder.fault(Fake(raises=broken), H100, CPU)


def test_what_fails_beside_others_is_compiled_again_alone(tmp_path, monkeypatch):
    """Python 3.11's parser fails now and then where several threads parse at once."""
    real, failed = JITFunction.parse, []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # empty: what Triton's cache has is not parsed
    sizes = [4096, 8192]

    def parse(function):
        if threading.current_thread() is not threading.main_thread() and len(failed) < 3:
            failed.append(function)
            raise SystemError("AST constructor recursion depth mismatch (before=33, after=28)")
        return real(function)

    with mock.patch.object(driver, "_active", AbsentDriver(90)), mock.patch.object(JITFunction, "parse", parse):
        kernels = compiled([greedy_launch(static, 32) for static in sizes])
    assert len(failed) >= 2
    assert [shared_memory(kernel).static for kernel in kernels] == sizes


# ---- what is given up ----


def failing_on(condition) -> object:
    """Stands for `ladder.fault`: fails on every GPU that fulfils the condition."""
    return lambda product, gpu, device: "it broke" if condition(gpu) else None


@pytest.mark.parametrize(
    ("condition", "expected", "told"),
    [
        (lambda gpu: False, H100, None),
        (lambda gpu: gpu.starts_early, replace(H100, starts_early=False), ladder.WITHOUT_EARLY),
        (lambda gpu: gpu.holds_tables, replace(H100, chosen=Decoding.PERMUTES), ladder.WITHOUT_TABLE),
        (
            lambda gpu: gpu.holds_tables or gpu.starts_early,
            replace(H100, chosen=Decoding.PERMUTES, starts_early=False),
            f"{ladder.WITHOUT_TABLE}; {ladder.WITHOUT_EARLY}",
        ),
        (lambda gpu: True, None, Fake.without),
    ],
)
def test_the_least_is_given_up(condition, expected, told, monkeypatch):
    monkeypatch.setattr(ladder, "fault", failing_on(condition))
    gpu, line = ladder.proven([Fake()], H100, CPU)
    assert gpu == expected
    if told is None:
        assert line is None
    else:
        assert f"it broke. Going on with {told}" in line
        assert triton.__version__ in line
        assert "\n" not in line


def test_a_layer_asks_once_and_what_was_given_up_is_given_up_for_all(monkeypatch, plugin_log):
    asked = []

    def fault(product, gpu, device):
        asked.append((product, gpu.holds_tables))
        return "it broke" if product == Fake(off=1) and gpu.holds_tables else None

    monkeypatch.setattr(ladder, "fault", fault)
    settle(CPU, replace(H100, starts_early=False))
    with plugin_log.at_level(logging.WARNING, logger="vllm.gptoss_nf4"):
        assert prepare.works(Fake(), CPU)
        assert prepare.works(Fake(), CPU)
        assert asked == [(Fake(), True)]
        assert prepare.works(Fake(off=1), CPU)
    assert gpu_of(CPU).decoding is Decoding.PERMUTES
    assert asked[-1] == (Fake(), False)  # the first one, tried again as it runs now
    assert len(plugin_log.records) == 1


def test_without_working_kernels_weights_are_dequantized(monkeypatch, plugin_log):
    monkeypatch.setattr(ladder, "fault", failing_on(lambda gpu: True))
    settle(CPU, H100)
    with plugin_log.at_level(logging.WARNING, logger="vllm.gptoss_nf4"):
        assert not prepare.works(Fake(), CPU)
        assert not prepare.works(Fake(), CPU)
    assert gpu_of(CPU) == H100  # other products may work
    assert len(plugin_log.records) == 1
    assert "6 to 9 times" in plugin_log.records[0].getMessage()


def test_a_user_may_choose(monkeypatch):
    monkeypatch.setattr(ladder, "fault", failing_on(lambda gpu: False))
    settle(CPU, H100)
    monkeypatch.setenv(ladder.SWITCH, "permutes")
    assert prepare.works(Fake(), CPU)
    assert gpu_of(CPU).decoding is Decoding.PERMUTES
    monkeypatch.setenv(ladder.SWITCH, "dequantize")
    settle(CPU, H100)
    assert not prepare.works(Fake(columns=32), CPU)
    monkeypatch.setenv(ladder.SWITCH, "fast")
    with pytest.raises(UserError, match=r"expected one of shared-table, permutes, dequantize|shared-table"):
        prepare.works(Fake(columns=16), CPU)


def test_an_absent_gpu_decodes_as_its_shared_memory_suggests():
    assert GPUS[90].decoding is Decoding.SHARED_TABLE
    assert GPUS[86].decoding is Decoding.PERMUTES
    assert replace(GPUS[86], chosen=Decoding.SHARED_TABLE).holds_tables
    assert Gpu(wgmma=False, shared_bytes=0, starts_early=False).decoding is Decoding.PERMUTES


# ---- variants ----


@triton.jit
def constant(out, KIND: tl.constexpr):
    tl.store(out, KIND)


def test_variants_between_two_powers_of_two_are_found():
    def start(tokens: int) -> None:
        kind = 0 if tokens < 601 else 1 if tokens < 603 else 2 if tokens < 700 else 3
        constant[(1,)](torch.empty(1, device=META), KIND=kind)

    assert {launch.arguments["KIND"] for launch in variants(start, 1000)} == {0, 1, 2, 3}
    assert {launch.arguments["KIND"] for launch in variants(start, 600)} == {0}

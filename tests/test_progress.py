"""Progress, the plan before a conversion, and what is left out of the noise."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from gptoss_nf4.engine import noise
from gptoss_nf4.fetch.budget import Budget, plan_line, stage_bytes
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.storage import progress
from gptoss_nf4.storage.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets it."""
    now = [0.0]
    monkeypatch.setattr("gptoss_nf4.storage.progress.time.monotonic", lambda: now[0])
    return now


def test_a_bar_is_as_wide_as_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "34")
    with Progress(100, "hashing") as shown:
        shown.advance(50)
        bars = [line.rstrip() for line in sys.stderr.getvalue().split("\r")]
    assert max(map(len, bars)) in (33, 34)


def test_without_a_terminal_a_line_says_how_far_it_is(clock, capsys):
    with Progress(4_000_000_000, "hashing") as shown:
        clock[0] = 20.0
        shown.advance(1_000_000_000)
    assert capsys.readouterr().err == "hashing: 1.0 GB of 4.0 GB, 60 s left\n"


def test_hours_make_few_lines(clock, capsys):
    steps = 10_000
    with Progress(steps, "x") as shown:
        for step in range(steps):
            clock[0] = step * 3600 / steps
            shown.advance(1)
    assert 10 <= len(capsys.readouterr().err.splitlines()) <= 40


def test_a_line_comes_at_the_very_second(clock, capsys):
    """Ten after the one before where a tenth is done, two minutes at the latest; no second sooner."""
    with Progress(1000, "x") as shown:
        for seconds, count, lines in (
            (9.9, 100, 0), (10.0, 0, 1), (19.9, 99, 0), (129.9, 0, 0), (130.0, 0, 1), (140.0, 99, 0), (141.0, 1, 1),
        ):  # fmt: skip
            clock[0] = seconds
            shown.advance(count)
            assert len(capsys.readouterr().err.splitlines()) == lines, seconds


def test_what_stands_still_says_so_too(clock, capsys):
    with Progress(1000, "x") as shown:
        clock[0] = 200.0
        shown.advance(0)
    assert "0.0 MB of 0.0 MB, inf s left" in capsys.readouterr().err


def test_what_is_quick_says_nothing(clock, capsys):
    with Progress(1000, "x") as shown:
        clock[0] = 2.0
        shown.advance(1000)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(1000, "hashing") as shown:
        shown.advance(500)
    assert "hashing:" in sys.stderr.getvalue()
    assert "%|" in sys.stderr.getvalue()


def test_a_process_whose_work_another_one_shows_tells_it(monkeypatch, clock, capsys):
    told = []
    monkeypatch.setattr(progress, "_shown_elsewhere", None)
    progress.show_elsewhere(told.append)
    with Progress(1000, "x") as shown:
        clock[0] = 1000.0
        shown.advance(300)
        shown.advance(700)
    assert told == [300, 700]
    assert capsys.readouterr().err == ""


def test_the_plan_has_time_disk_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("gptoss_nf4.fetch.budget.available_memory", lambda: 5 << 30)
    monkeypatch.setattr("gptoss_nf4.fetch.budget.free_disk", lambda root: 7_000_000_000 if root == tmp_path else 0)
    plan = Budget(disk_bytes=13_000_000_000, memory_bytes=1 << 30)
    line = plan_line(plan, 12_000_000_000, tmp_path, hashing_speed=12e9)
    assert f"to convert and prove 12.0 GB: about 39 s on {len(os.sched_getaffinity(0))} cores" in line
    assert "13.0 GB of disk (7 GB are free), 1.0 GiB of memory (5 GiB are free)" in line
    assert "about" not in plan_line(plan, 12_000_000_000, tmp_path, hashing_speed=None)
    assert "about 28 minutes on" in plan_line(plan, 12_000_000_000, tmp_path, hashing_speed=1e8)


def test_the_estimate_is_what_was_measured(tmp_path):
    """gpt-oss-20b on two cores: 12.5 GB hashed in 4.3 to 5 s, converted in 59 s and proved in 30."""
    for hashing in (4.3, 5.0):
        line = plan_line(Budget(0, 0), 12_500_000_000, tmp_path, hashing_speed=12.5e9 / hashing)
        (seconds,) = re.findall(r"about (\d+) s on", line)
        assert int(seconds) == pytest.approx(59 + 30, rel=0.1)


def test_a_stage_writes_what_the_bar_goes_up_to(tiny, converted):
    """Within a tenth: headers, small tensors and the router's dtype are not counted."""
    source = open_checkpoint(tiny)
    files = {"requant@1": converted / "layer-1.safetensors", "normalize": converted / "dense.safetensors"}
    files["dequant@0"] = converted.parent / "absmax/layer-0.safetensors"
    for stage, file in files.items():
        assert stage_bytes(source, stage, "float16") == pytest.approx(file.stat().st_size, rel=0.1), stage


def logged(name: str, message: str) -> bool:
    """Whether a warning of logger `name` comes through."""
    came: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: came.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        logger.warning(message)
    finally:
        logger.removeHandler(handler)
    return bool(came)


@pytest.fixture
def quiet():
    """`leave_out_noise`, taken back afterwards."""
    with warnings.catch_warnings():
        noise.leave_out_noise()
        yield
    for name in noise.LOGGED:
        for each in list(logging.getLogger(name).filters):
            logging.getLogger(name).removeFilter(each)


@pytest.mark.usefixtures("quiet")
def test_noise_is_left_out_and_real_warnings_come_through():
    noise.leave_out_noise()  # once is enough, and twice is no more
    for name, beginnings in noise.LOGGED.items():
        assert len(logging.getLogger(name).filters) == 1
        for beginning in beginnings:
            assert not logged(name, beginning + " and more")
            assert logged(f"{name}.other", beginning)  # the same words from elsewhere
        assert logged(name, "KV cache is too small")


def test_a_warning_of_the_same_kind_from_elsewhere_comes_through():
    """As a program sees it: on its stderr."""
    code = """
import warnings
from gptoss_nf4.engine.noise import leave_out_noise
leave_out_noise()
for module in ("vllm.triton_utils.dispatcher", "vllm.other"):
    warnings.warn_explicit("`torch.distributed.reduce_op` is deprecated", FutureWarning, module + ".py", 1, module)
warnings.warn_explicit("values are not finite", FutureWarning, "x.py", 1, "vllm.triton_utils.dispatcher")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [line.split(":")[0] for line in done.stderr.splitlines() if "FutureWarning" in line]
    assert told == ["vllm.other.py", "x.py"], done.stderr

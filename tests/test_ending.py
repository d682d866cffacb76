"""A run that is ended from outside leaves no process behind and no lock, and the next one goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from benchmarks.conversion import checkout

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
ENVIRONMENT.pop("PYTHONPATH", None)  # the checkout's code runs, not this one's
SECONDS = 2.0  # an end takes 0.1 s on an idle machine
BODY = ") -> str:\n"  # of a stage's main
ASLEEP = "    import pathlib, time; pathlib.Path('{}').touch(); time.sleep(300)\n"
COMMANDS = {"parallel": ["stages/parallel.py", "prove"], "convert": ["stages/convert.py", "MODEL=tiny"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Path]:
    """A checkout in which DVC runs stages by a shell that stays above them, as dash does and bash does not."""
    shell = tmp_path_factory.mktemp("shell") / "stays"
    shell.write_text('#!/bin/sh\nsh "$@"\nexit $?\n')
    shell.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "SHELL", str(shell))
        yield checkout(tmp_path_factory.mktemp("ended") / "checkout")


def started(project: Path, name: str, stage: str, nohup: bool = False) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """The run and all processes below it, at a moment when `stage` is at work and would be for minutes."""
    script, asleep = project / f"stages/{stage}.py", project / f"asleep-{time.time_ns()}"
    whole = script.read_text()
    before, body, after = whole.rpartition(BODY)
    script.write_text(before + body + ASLEEP.format(asleep.name) + after)
    try:
        process = subprocess.Popen(
            [*["nohup"] * nohup, sys.executable, *COMMANDS[name]],
            cwd=project,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # these tests may run below nohup
        )
        while not asleep.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    finally:
        script.write_text(whole)
    return process, psutil.Process(process.pid).children(recursive=True)


def gone_after(processes: list[psutil.Process]) -> float:
    """Seconds until none of `processes` runs; 60 at most."""
    begun = time.monotonic()
    while time.monotonic() - begun < 60:
        alive = [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            break
        time.sleep(0.02)
    return time.monotonic() - begun


# fetch and prove run below DVC, dequant and normalize in forks of the server.
@pytest.mark.parametrize(
    ("name", "stage", "number"),
    [
        ("parallel", "fetch", signal.SIGTERM),
        ("parallel", "dequant", signal.SIGTERM),
        ("parallel", "dequant", signal.SIGHUP),
        ("parallel", "dequant", signal.SIGKILL),
        ("parallel", "fetch", signal.SIGKILL),
        ("convert", "normalize", signal.SIGTERM),
        ("convert", "prove", signal.SIGTERM),
        ("convert", "prove", signal.SIGKILL),
    ],
)
def test_nothing_of_a_run_outlives_it(project, name, stage, number):
    process, below = started(project, name, stage)
    assert len(below) >= 2
    process.send_signal(number)
    seconds = gone_after([psutil.Process(process.pid), *below])
    for each in below:  # whatever the outcome, none stays behind this test
        if each.is_running():
            each.kill()
    _, error = process.communicate(timeout=30)
    assert seconds < SECONDS
    assert "Traceback" not in error
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"{name}: ended by {number.name}; run the command again to go on" in error


def test_the_next_run_goes_on(project):
    """After all those above."""
    done = subprocess.run(
        [sys.executable, *COMMANDS["parallel"]], cwd=project, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "artifacts/tiny/checkpoint.sha256").exists()
    assert not list(project.rglob("*.part"))


def test_a_run_below_nohup_outlives_its_terminal(project):
    (project / "dvc.lock").unlink()
    process, below = started(project, "parallel", "fetch", nohup=True)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert gone_after(below) < SECONDS
    process.communicate(timeout=30)

"""Running `vllm serve` for a test or a benchmark."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptoss_nf4.errors import UserError

START_SECONDS = 900  # a cold start compiles and captures CUDA graphs
Start = Callable[..., subprocess.Popen]
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`, and its first process."""

    url: str
    pid: int


@contextmanager
def server(checkpoint: Path, engine_args: dict, log: Path, start: Start = subprocess.Popen) -> Iterator[str]:
    """Run `vllm serve` on a free port of this machine; yields its base URL. `start` starts the process."""
    with server_process(checkpoint, engine_args, log, start) as started:
        yield started.url


@contextmanager
def server_process(checkpoint: Path, engine_args: dict, log: Path, start: Start = subprocess.Popen) -> Iterator[Server]:
    """`server`, where more than the URL is asked for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*VLLM, "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), *as_flags(engine_args)]
    with _running(command, f"http://127.0.0.1:{port}", log, start) as started:
        yield started


@contextmanager
def running(command: list[str], url: str, log: Path) -> Iterator[str]:
    """Run `command`, which serves at `url`; yields that."""
    with _running(command, url, log, subprocess.Popen):
        yield url


@contextmanager
def _running(command: list[str], url: str, log: Path, start: Start) -> Iterator[Server]:
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = start(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_until_ready(url, process, log, started)
        yield Server(url, process.pid)
    finally:
        _end(process)


def as_flags(engine_args: dict) -> list[str]:
    """{"max_model_len": 8, "enforce_eager": True} -> ["--max-model-len", "8", "--enforce-eager"]."""
    flags = []
    for key, value in engine_args.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _wait_until_ready(url: str, process: subprocess.Popen, log: Path, started: float) -> None:
    while time.monotonic() - started < START_SECONDS:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    state = "no answer" if process.poll() is None else f"exit status {process.returncode}"
    raise UserError(
        "vllm serve did not start",
        where=log,
        got=f"{state} after {time.monotonic() - started:.0f} s",
        expected="a server that answers",
        next_step="read the log; the first ERROR line says why",
    )


def _end(process: subprocess.Popen) -> None:
    """End the server and whatever it started."""
    for number, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

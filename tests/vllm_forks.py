"""Processes that have imported vLLM already. They take the place of `subprocess.run` and `subprocess.Popen` in tests.

Importing vLLM takes 13 s of a core, and its engine and each of its workers import it again. Here a server imports it once
and forks for each command. What vLLM would start anew ("spawn") is forked too. What runs in a fork is the same.

    python tests/vllm_forks.py SOCKET    # the server; it ends when its standard input does
"""

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

MODULES = (
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.lora.request",
    "vllm.model_executor.models.gpt_oss",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
# Triton's own functions are made for its interpreter by their import. vLLM on a CPU uses none; some tests run kernels.
SETTINGS = {"TRITON_INTERPRET": "1"}
START_SECONDS = 300
LONGEST = 1 << 18  # bytes of a request: command and environment


class Forked:
    """A command that runs, or has run, in a fork; as much of `subprocess.Popen` as is used here."""

    def __init__(self, args: Sequence, connection: socket.socket) -> None:
        self.args, self.returncode = args, None
        self._connection = connection
        self.pid = int(connection.recv(32))

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._connection.recv(32) or -signal.SIGKILL)
            self._connection.close()
        return self.returncode


class Forks:
    """The server, seen from tests. It is started where it is first asked for a process."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp()  # a short path, as sockets need
        self._path = f"{self._directory}/forks"
        self._server: subprocess.Popen | None = None

    def popen(
        self,
        command: Sequence,
        *,
        stdout: IO,
        stderr: IO | int,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        start_new_session: bool = True,
    ) -> Forked:
        """Start `command`, which is python and a script, or python, -m and a module, each with arguments."""
        assert command[0] == sys.executable
        assert start_new_session
        self._start()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a message stays one
        connection.connect(self._path)
        asked = {
            "command": [os.fspath(each) for each in command[1:]],
            "env": dict(os.environ if env is None else env),
            "cwd": os.fspath(cwd or Path.cwd()),
        }
        errors = stdout if stderr == subprocess.STDOUT else stderr
        socket.send_fds(connection, [json.dumps(asked).encode()], [each.fileno() for each in (stdout, errors)])
        return Forked(command, connection)

    def run(
        self, command: Sequence, *, cwd: Path, text: bool, env: Mapping[str, str] | None = None, **_: object
    ) -> subprocess.CompletedProcess:
        """`subprocess.run` with capture_output=True."""
        assert text
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            status = self.popen(command, stdout=out, stderr=errors, env=env, cwd=cwd).wait()
            out.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(command, status, out.read(), errors.read())

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(60)
        shutil.rmtree(self._directory)

    def _start(self) -> None:
        if self._server is None:
            command = [sys.executable, __file__, self._path]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | SETTINGS)
            began = time.monotonic()
            while not os.path.exists(self._path):
                assert self._server.poll() is None, "the server ended, see above"
                assert time.monotonic() - began < START_SECONDS
                time.sleep(0.05)


def serve(path: str) -> None:
    """Fork for each connection at `path` until standard input ends."""
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path + ".new")
    listening.listen()
    os.rename(path + ".new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who tell of their end themselves
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            tell(connection)
        connection.close()
    os._exit(0)  # without what Triton says of its leaks


def tell(connection: socket.socket) -> None:
    """Fork once more for the command that `connection` asks for, tell its number and how it ends, and end."""
    text, streams, _, _ = socket.recv_fds(connection, LONGEST, 2)
    asked = json.loads(text)
    if (pid := os.fork()) == 0:
        connection.close()
        do(asked, streams)
    connection.send(str(pid).encode())
    for stream in streams:
        os.close(stream)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):  # the test has ended
        connection.send(str(status).encode())
    os._exit(0)


def do(asked: dict, streams: Sequence[int]) -> None:
    """Be the process that `asked` describes."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
    status = 1
    try:
        first, *arguments = asked["command"]
        if first == "-m":
            sys.argv = arguments
            sys.path[0] = ""
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = asked["command"]
            sys.path[0] = os.path.dirname(first)
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for each in multiprocessing.active_children():
            each.join(10)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])

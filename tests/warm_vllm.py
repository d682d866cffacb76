"""`subprocess.run` and `subprocess.Popen` for what imports vLLM: in a fork of a process that has imported it.

Importing vLLM takes 13 s of a core, and its engine and each of its workers import it again. A fork runs the same.
"""

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import warm_python


class Process(warm_python.Process):
    """As much of `subprocess.Popen` as is used here."""

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return super().wait()


def popen(
    command: Sequence,
    *,
    stdout: IO,
    stderr: IO | int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    start_new_session: bool = True,
) -> Process:
    """Start `command`: python and a script, or python, -m and a module, each with arguments."""
    assert command[0] == sys.executable
    assert start_new_session
    arguments, environment = [os.fspath(each) for each in command[1:]], dict(os.environ if env is None else env)
    outputs = [each.fileno() for each in (stdout, stdout if stderr == subprocess.STDOUT else stderr)]
    with open(os.devnull) as null:
        fds = [null.fileno(), *outputs]
        return Process(warm_python.place(), arguments, str(cwd or Path.cwd()), environment, fds, "vllm")


def run(
    command: Sequence, *, cwd: Path, text: bool, env: Mapping[str, str] | None = None, **_: object
) -> subprocess.CompletedProcess:
    """`subprocess.run` with capture_output=True."""
    assert text
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        status = popen(command, stdout=out, stderr=errors, env=env, cwd=cwd).wait()
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, status, out.read(), errors.read())

"""The parent's side of a contender's process: starts it, asks it, notices when it dies, and says why."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from benchmarks.serving.cells import Cell
from benchmarks.serving.jobs import Job

CONTENDER = [sys.executable, "-m", "benchmarks.serving.contender"]
# An engine that has been asked counts as hung after ANSWER_SECONDS, and some for its prompts: the slowest GPUs read more.
ANSWER_SECONDS, PROMPT_TOKENS_A_SECOND = 120.0, 500.0
LOOK_SECONDS = 0.5  # between looks at whether it still runs
END_SECONDS = 30.0  # for ending by itself
REASON_LENGTH = 200
WARNING = re.compile(r"(?:^|\s)WARNING ")
ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit): .+)")


class Engine:
    """A contender's process; `contender` has its side of the conversation."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.facts: dict[str, Any] = {}
        """What it told when it was ready."""
        self.failure: str | None = None
        """Why it measures nothing any more, in one line."""
        # In-process engine: the router can be watched, and a contender can exchange the plugin's method.
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
        with job.log.open("w") as log:
            self._process = subprocess.Popen(
                [*CONTENDER, job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                process_group=0,  # one of its own, with the compilers that it starts
            )
        assert self._process.stdin is not None  # pipes, as asked for
        assert self._process.stdout is not None
        self._to = self._process.stdin
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def wait_until_ready(self, deadline: float) -> None:
        """Until it is ready or has failed, or `time.monotonic` is at `deadline`: then it has failed too."""
        facts = self._wait_for("READY ", max(0.0, deadline - time.monotonic()), "was not ready in time (--start-minutes)")
        self.facts = facts or {}

    def wall_ms(self, cell: Cell, steps: int) -> float | None:
        """One value of a cell by the wall clock; None where it failed, now or before."""
        answer = self.ask(answer_seconds(cell), do="wall", cell=asdict(cell), steps=steps)
        return None if answer is None else answer["ms"]

    def device(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's time on the device: `device_ms` and `kernels_us`."""
        return self.ask(answer_seconds(cell), do="device", cell=asdict(cell))

    def state(self) -> dict[str, Any] | None:
        """What has come of it so far: `contender.state`."""
        return self.ask(ANSWER_SECONDS, do="state")

    def routing(self, batches: list[int]) -> dict[str, Any] | None:
        """`distinct_experts` of `batches`; to be asked for last."""
        return self.ask(ANSWER_SECONDS, do="routing", batches=batches)

    def ask(self, seconds: float, **question: object) -> dict[str, Any] | None:
        """The answer. None if it failed, now or before, or gives none for `seconds`."""
        if self.failure is not None:
            return None
        with suppress(BrokenPipeError):  # it has ended since it last said something: so will its output
            self._to.write(json.dumps(question) + "\n")
            self._to.flush()
        return self._wait_for("RESULT ", seconds, f"did not answer for {seconds:.0f} s")

    def dismiss(self) -> None:
        """It ends when nothing more can come from here."""
        with suppress(BrokenPipeError):  # a question that it did not read is still to be written
            self._to.close()

    def end(self) -> None:
        """Wait until it has ended after `dismiss`. One that does not end is killed."""
        if self.failure is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        self._kill()

    def _kill(self) -> None:
        """It, and what it started: compilers would slow the others down."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._lines.put(line)
        self._lines.put(None)

    def _wait_for(self, start: str, seconds: float, otherwise: str) -> dict[str, Any] | None:
        """The object after `start` in the first line that begins so. None if it ends before, or `seconds` pass."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, min(LOOK_SECONDS, until - time.monotonic())))
            except queue.Empty:
                if self._process.poll() is not None:
                    line = None  # what it started may hold its output open
                elif time.monotonic() < until:
                    continue
                else:
                    self.failure = otherwise
                    self._kill()
                    return None
            if line is None:
                status = self._process.wait()
                self.failure = reason(status, self.job.log.read_text(errors="replace"))
                self._kill()
                return None
            if line.startswith(start):
                return json.loads(line.removeprefix(start))


def answer_seconds(cell: Cell) -> float:
    return ANSWER_SECONDS + cell.batch * cell.tokens / PROMPT_TOKENS_A_SECOND


def reason(status: int, log: str) -> str:
    """Why a process ended, in one line: the last error in its log, else its last line.

    Warnings are left out: vLLM warns of errors that it survives.
    """
    ended = signal.Signals(-status).name if status < 0 else f"status {status}"
    lines = [line.strip() for line in log.splitlines() if line.strip() and not WARNING.search(line)]
    said = next((found[1] for line in reversed(lines) if (found := ERROR.search(line))), lines[-1] if lines else "no word")
    return f"ended with {ended}: {said[:REASON_LENGTH]}"

"""How far a long piece of work is, in bytes: a bar on a terminal, elsewhere a line now and then. Both go to stderr."""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

# Where there is no terminal. A line comes with each tenth of the work, but not sooner than the first of these after the
# one before, and at the latest after the second: a log of hours stays short, and nothing takes the work for dead.
SOONEST_SECONDS, LATEST_SECONDS = 10.0, 120.0
SHARE_OF_A_LINE = 0.1

# Set in a process whose work another one shows.
_shown_elsewhere: Callable[[int], None] | None = None


def show_elsewhere(advance: Callable[[int], None]) -> None:
    """From now on no `Progress` of this process shows anything. `advance` is told the bytes that are done."""
    global _shown_elsewhere
    _shown_elsewhere = advance


def size_text(count: int) -> str:
    """`count` bytes for the user: in GB, or in MB where they are fewer."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class Progress:
    """What is done of `total` bytes. `what` is the work, such as "hashing the source". Threads may share it.

    >>> with Progress(source_bytes, "hashing the source") as progress:
    ...     progress.advance(len(piece))
    """

    def __init__(self, total: int, what: str):
        from tqdm import tqdm

        self._total, self._what = total, what
        self._done, self._said_at, self._lock = 0, 0, threading.Lock()
        self._started = self._said = time.monotonic()
        # disable=None: no bar where stderr is no terminal. One that does not know its size counts as 80 by 24.
        disable, size = True if _shown_elsewhere else None, shutil.get_terminal_size()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=disable,
            ncols=size.columns,
            nrows=size.lines,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        if _shown_elsewhere:
            _shown_elsewhere(count)
            return
        with self._lock:
            self._done += count
            self._bar.update(count)
            now = time.monotonic()
            if self._bar.disable and self._due(now - self._said):
                self._said, self._said_at = now, self._done
                self._say(now - self._started)

    def _due(self, waited: float) -> bool:
        much = self._done - self._said_at >= SHARE_OF_A_LINE * self._total
        return waited >= (SOONEST_SECONDS if much else LATEST_SECONDS)

    def _say(self, seconds: float) -> None:
        left = (self._total - self._done) * seconds / self._done if self._done else float("inf")
        line = f"{self._what}: {size_text(self._done)} of {size_text(self._total)}, {left:.0f} s left\n"
        print(line, end="", file=sys.stderr, flush=True)  # one write: others print too

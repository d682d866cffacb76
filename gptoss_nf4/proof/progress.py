"""How far a long piece of work is, in bytes."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere a line through `say` now and then. Threads may share it."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self._total, self._say = total, say
        self._done, self._lock = 0, threading.Lock()
        self._started = self._said = time.monotonic()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)  # None: where stderr is no terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        with self._lock:
            self._done += count
            self._bar.update(count)
            now = time.monotonic()
            if self._bar.disable and now - self._said >= SECONDS_BETWEEN_LINES:
                self._said = now
                speed = self._done / (now - self._started)
                left = (self._total - self._done) / speed
                self._say(f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {left:.0f} s left")

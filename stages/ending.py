"""Ending with everything that was started: no process of a run works on when the run is gone.

A run is a tree: parallel.py, DVC, the server that forks, the stages. SIGTERM and SIGHUP end it from the top. Where the top
is killed and can do nothing, those below notice: forks by the sentinel of their parent, the others by the kernel's signal.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_END = 0.5
TOP = "GPTOSS_NF4_RUN"  # in the environment of what a run starts: the process at its top
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_together() -> None:
    """From now on SIGTERM and SIGHUP end this process and all below it. A signal that is ignored, by nohup, stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    os.environ[TOP] = str(os.getpid())


def _end(number: int, frame: FrameType | None) -> None:
    import psutil

    # The highest first: DVC would say that a stage failed, and the server would fork again.
    below = psutil.Process().children(recursive=True)
    for kill in (psutil.Process.terminate, psutil.Process.kill):
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill(process)
        _, below = psutil.wait_procs(below, timeout=SECONDS_TO_END)
    name = Path(sys.argv[0]).stem
    line = f"{name}: ended by {signal.Signals(number).name}; run the command again to go on\n"
    os.write(sys.stderr.fileno(), line.encode())  # print may be what was interrupted
    os._exit(128 + number)  # without waiting for threads


def end_with_parent() -> None:
    """In a fork of multiprocessing's: end when the process that asked for it is gone."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def wait() -> None:
            connection.wait([sentinel])
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=wait, daemon=True).start()


def end_with_run() -> None:
    """In what a run starts: have the kernel end this process when the one above it is gone (prctl(2), Linux only).

    Nothing, where no run is above: a stage that was started by hand may outlive its shell.
    """
    top = os.environ.get(TOP, "")
    if not top.isdecimal() or int(top) == os.getpid() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        os.kill(int(top), 0)
    except ProcessLookupError:  # it was gone before the kernel knew
        os._exit(128 + signal.SIGKILL)

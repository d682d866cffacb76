"""Ending with everything that was started: no process of a run works on when the run is gone.

A run is a tree: parallel.py, DVC, the server that forks, the stages. SIGTERM and SIGHUP end it from the top. Where the top
is killed and can do nothing, those below notice: each watches the nearest one of ours above it. The kernel's own signal
(PR_SET_PDEATHSIG) would watch the parent, and that may be a shell which lives on: DVC runs a stage by $SHELL.

And Ctrl-C, which a terminal sends to all of them. Scripts import this before anything else: what takes long is importing.
"""

import os
import sys


def _script() -> str:
    """What messages call this process."""
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]


def _one_line_for_ctrl_c(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Called for an exception that nothing caught. Ctrl-C, also while importing, gets one line instead of a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, error.__traceback__)
        return
    line = f"{_script()}: interrupted, nothing is half-written; run the command again to go on"
    print(line, file=sys.stderr, flush=True)
    os._exit(130)  # without waiting for threads


sys.excepthook = _one_line_for_ctrl_c  # os and sys are what Python has imported anyway

import contextlib  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
from types import FrameType  # noqa: E402

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_END = 0.5
ABOVE = "GPTOSS_NF4_RUN"  # in the environment of what a process of a run starts: that process


def end_together() -> None:
    """From now on SIGTERM and SIGHUP end this process and all below it. A signal that is ignored, by nohup, stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    os.environ[ABOVE] = str(os.getpid())


def _end(number: int, frame: FrameType | None) -> None:
    import psutil

    # The highest first: DVC would say that a stage failed, and the server would fork again.
    below = psutil.Process().children(recursive=True)
    for kill in (psutil.Process.terminate, psutil.Process.kill):
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill(process)
        _, below = psutil.wait_procs(below, timeout=SECONDS_TO_END)
    line = f"{_script()}: ended by {signal.Signals(number).name}; run the command again to go on\n"
    os.write(sys.stderr.fileno(), line.encode())  # print may be what was interrupted
    os._exit(128 + number)  # without waiting for threads


def end_with_run() -> None:
    """In what a run starts: end when the process of the run above this one is gone. What this one starts watches this one.

    Nothing, where no run is above: a stage that was started by hand may outlive its shell. And nothing where the system
    has no file for a process (pidfd_open(2) is Linux's).
    """
    above = os.environ.get(ABOVE, "")
    if not above.isdecimal() or int(above) == os.getpid():
        return
    os.environ[ABOVE] = str(os.getpid())
    try:
        process = os.pidfd_open(int(above))
    except ProcessLookupError:  # it was gone before this one looked
        os._exit(128 + signal.SIGKILL)
    except (AttributeError, OSError):
        return

    def wait() -> None:
        select.select([process], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()

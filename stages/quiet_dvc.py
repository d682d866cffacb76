"""DVC without its hints: python stages/quiet_dvc.py [arguments of dvc]

`dvc repro` tells of each stage that it is skipped, and after each run how to add dvc.lock to git: a hundred lines for 24
layers, around ten that say something. This leaves out what DVC logs as information. Warnings, errors and progress bars
stay, and so does whatever a stage prints.
"""

from ending import end_with_run

# isort: split
import logging
import os
import sys
from types import TracebackType

STAGE_ENDED = 1  # with an error, which it has told in its own words


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while DVC is imported: whoever started this says that it was interrupted."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _without_traceback
end_with_run()

from dvc.cli import main as dvc_main  # noqa: E402
from dvc.stage.exceptions import StageCmdFailedError  # noqa: E402
from dvc.ui import ui  # noqa: E402

# Commands whose answer is what they are for; of the others only what a stage prints counts.
ANSWERS = ("status",)


def tells_something(record: logging.LogRecord) -> bool:
    """False for DVC's own error on a stage that has just said what is wrong."""
    error = record.exc_info[1] if record.exc_info else None
    cause = error.__cause__ if error else None
    told = f"exited with {STAGE_ENDED}"
    return not (isinstance(cause, StageCmdFailedError) and str(cause).endswith(told))


def main() -> None:
    for name in ("dvc", "dvc_objects", "dvc_data"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            handler.addFilter(tells_something)
    if sys.argv[1] not in ANSWERS:
        ui.enable = lambda: None
    sys.exit(dvc_main(sys.argv[1:]))


if __name__ == "__main__":
    main()

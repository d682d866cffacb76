"""This machine: room on its disks, and its cores."""

import os
import shutil
from pathlib import Path

from gptoss_nf4.errors import UserError


def require_disk(needed: int, directory: Path, purpose: str) -> None:
    """UserError where fewer than `needed` bytes are free on the disk of `directory`, which need not exist yet."""
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            "disk too small",
            where=existing,
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB for {purpose}",
            next_step="make room there, then run the command again",
        )


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))

"""This machine: room on its disks, its cores and its memory."""

import os
import shutil
from pathlib import Path

from gptoss_nf4.errors import UserError

CGROUP = Path("/sys/fs/cgroup")  # in a container its own group lies here (cgroup v2)


def require_disk(needed: int, directory: Path, purpose: str) -> None:
    """UserError where fewer than `needed` bytes are free on the disk of `directory`, which need not exist yet."""
    free = free_disk(directory)
    if needed > free:
        raise UserError(
            "disk too small",
            where=_existing(directory),
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB for {purpose}",
            next_step="make room there, then run the command again",
        )


def free_disk(directory: Path) -> int:
    """Free bytes on the disk of `directory`, which need not exist yet."""
    return shutil.disk_usage(_existing(directory)).free


def _existing(directory: Path) -> Path:
    return next(path for path in (directory, *directory.resolve().parents) if path.exists())


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory() -> int:
    """Bytes of memory that can still be taken without swapping. A container's own limit counts too."""
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_container()])


def _left_in_container() -> list[int]:
    """[what this process's control group may still take], by cgroup v2's files, or [] where it has no limit."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        fields = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    # The page cache is given back when memory is asked for.
    return [] if limit == "max" else [int(limit) - used + int(fields["inactive_file"]) + int(fields["active_file"])]

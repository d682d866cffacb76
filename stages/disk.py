"""What results take on the disk, and freeing it: python stages/disk.py [--free]

--free runs `dvc gc --workspace`: it deletes from DVC's cache what dvc.lock does not name. Links to the cache take no room
of their own, so the files of results are in the cache and in artifacts/ at once.
"""

import subprocess
import sys
from pathlib import Path

from common import ROOT
from params import read_params

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.machine import free_disk
from gptoss_nf4.storage.progress import size_text

CACHE, ARTIFACTS = Path(".dvc/cache"), Path("artifacts")
DVC_GC = [sys.executable, "-m", "dvc", "gc", "--workspace", "--force", "--quiet"]


def taken(*directories: Path) -> int:
    """Bytes on the disk below `directories`. A file with several names counts once."""
    files = [path.lstat() for directory in directories for path in directory.rglob("*")]
    return sum({(each.st_dev, each.st_ino): each.st_blocks * 512 for each in files}.values())


def lines(current: str) -> list[str]:
    """What there is, for the user. `current` is the model of params.yaml."""
    found = [f"{size_text(taken(CACHE, ARTIFACTS))} in all, {free_disk(ROOT) / 1e9:.0f} GB are free on this disk"]
    beyond = taken(CACHE, ARTIFACTS) - taken(ARTIFACTS)
    found.append(f"{size_text(beyond)} only in DVC's cache: old results; `make free` deletes them")
    for directory in sorted(path for path in ARTIFACTS.glob("*") if path.is_dir()):
        what = "the model of params.yaml" if directory.name == current else f"to delete it: rm -r {directory}; make free"
        found.append(f"{size_text(taken(directory))} in {directory}: {what}")
    return found


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    if "--free" in sys.argv[1:]:
        before = taken(CACHE, ARTIFACTS)
        if subprocess.run(DVC_GC).returncode:
            sys.exit("error: dvc gc failed: run `dvc gc --workspace` to see why; nothing else was deleted")
        print(f"{size_text(before - taken(CACHE, ARTIFACTS))} freed")
    try:
        current = str(read_params()["model"].get("name"))
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines(current)))


if __name__ == "__main__":
    main()

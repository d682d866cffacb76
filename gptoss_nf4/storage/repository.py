"""A repository of the Hugging Face hub: telling it from a path on this machine, and its files from ours."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_nf4.storage.writing import git_blob_sha1, sha256_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

OWNER_AND_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_repository(given: str) -> bool:
    """Whether `given` is a repository: it has the form owner/name, and there is no such path here."""
    return OWNER_AND_NAME.fullmatch(given) is not None and not Path(given).expanduser().exists()


def digests(
    hub_file: "RepoSibling", path: Path, advance: Callable[[int], None] = lambda count: None
) -> tuple[str | None, str]:
    """(the hub's digest of its file, that of the file `path`): SHA-256 in LFS, else git's blob id. None: it tells none."""
    if hub_file.lfs:
        return hub_file.lfs.sha256, sha256_of(path, advance)
    return hub_file.blob_id, git_blob_sha1(path, advance)

"""Downloading a repository into huggingface_hub's own cache, and checking what came."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.source.model import HUB_PATTERNS
from gptoss_nf4.storage.machine import cores, require_disk
from gptoss_nf4.storage.progress import Progress, size_text
from gptoss_nf4.storage.repository import digests

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


def download(repository: str, revision: str | None, say: Callable[[str], None] = lambda line: None) -> tuple[Path, str]:
    """Download `repository` and return (snapshot directory, commit). `say` gets a line on what there is to download.

    `revision` is a commit, a branch or a tag; None is the default branch. It is resolved to a commit first, so that the
    manifest can record what was read. An interrupted download goes on where it stopped. The digest of every file is
    compared with the hub's: SHA-256 for large files, git's blob SHA-1 for small ones. UserError where any of this fails.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        missing = _require_room(info, repository)
        if missing:
            say(f"downloading {size_text(missing)} of {repository} into {constants.HF_HUB_CACHE}")
        directory = Path(snapshot_download(repository, revision=info.sha, allow_patterns=list(HUB_PATTERNS)))
    except RepositoryNotFoundError:
        raise UserError(
            "no such repository",
            where="Hugging Face",
            got=f"{repository} at {revision or 'its default branch'}",
            expected="a repository that you may read",
            next_step="check the name and the revision, or run `hf auth login`",
        ) from None
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            "download failed",
            where=repository,
            got=first_line(error),
            expected="every file of the repository",
            next_step="run `dvc repro` again; what is there already is kept",
        ) from None
    _check_digests(directory, info)
    return directory, info.sha


def _require_room(info: "ModelInfo", repository: str) -> int:
    """Bytes to download, without files that are there already. UserError where the cache's disk cannot hold them."""
    from huggingface_hub import constants, try_to_load_from_cache

    wanted = [f for f in info.siblings if f.size and any(Path(f.rfilename).match(pattern) for pattern in HUB_PATTERNS)]
    there = {
        f.rfilename for f in wanted if isinstance(try_to_load_from_cache(repository, f.rfilename, revision=info.sha), str)
    }
    needed = sum(f.size for f in wanted if f.rfilename not in there)
    require_disk(needed, Path(constants.HF_HUB_CACHE), f"the download of {repository}")
    return needed


def _check_digests(directory: Path, info: "ModelInfo") -> None:
    """UserError for a file of the snapshot whose digest is not the hub's."""
    came = {directory / each.rfilename: each for each in info.siblings if (directory / each.rfilename).is_file()}
    size = sum(path.stat().st_size for path in came)
    # hashlib lets go of the interpreter lock.
    with Progress(size, "checking the download") as progress, ThreadPoolExecutor(cores()) as pool:
        checks = [pool.submit(_check, path, each, progress) for path, each in came.items()]
        for check in checks:
            check.result()


def _check(path: Path, hub_file: "RepoSibling", progress: Progress) -> None:
    expected, got = digests(hub_file, path, progress.advance)
    if expected is not None and got != expected:
        raise UserError(
            "wrong digest",
            where=path,
            got=got,
            expected=expected,
            next_step=f"delete {path.resolve()} and run `dvc repro` again",
        )

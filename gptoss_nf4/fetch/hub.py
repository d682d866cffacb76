"""Downloading a repository into huggingface_hub's own cache, and checking what came."""

from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.source.model import HUB_PATTERNS
from gptoss_nf4.storage.machine import require_disk
from gptoss_nf4.storage.writing import git_blob_sha1, sha256_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


def download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Download `repository` and return (snapshot directory, commit).

    `revision` is a commit, a branch or a tag; None is the default branch. It is resolved to a commit first, so that the
    manifest can record what was read. An interrupted download goes on where it stopped. The digest of every file is
    compared with the hub's: SHA-256 for large files, git's blob SHA-1 for small ones. UserError where any of this fails.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        _require_room(info, repository)
        directory = Path(snapshot_download(repository, revision=info.sha, allow_patterns=list(HUB_PATTERNS)))
    except RepositoryNotFoundError:
        raise UserError(
            "no such repository",
            where="Hugging Face",
            got=f"{repository} at {revision or 'its default branch'}",
            expected="a repository that you may read",
            next_step="check the name and the revision, or run `hf auth login`",
        ) from None
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            "download failed",
            where=repository,
            got=first_line(error),
            expected="every file of the repository",
            next_step="run `dvc repro` again; what is there already is kept",
        ) from None
    for sibling in info.siblings:
        path = directory / sibling.rfilename
        if path.is_file():
            _check(path, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)
    return directory, info.sha


def _require_room(info: "ModelInfo", repository: str) -> None:
    """UserError where the cache's disk cannot hold the download. Files that are there already are not counted."""
    from huggingface_hub import constants, try_to_load_from_cache

    wanted = [f for f in info.siblings if f.size and any(Path(f.rfilename).match(pattern) for pattern in HUB_PATTERNS)]
    there = {
        f.rfilename for f in wanted if isinstance(try_to_load_from_cache(repository, f.rfilename, revision=info.sha), str)
    }
    needed = sum(f.size for f in wanted if f.rfilename not in there)
    require_disk(needed, Path(constants.HF_HUB_CACHE), f"the download of {repository}")


def _check(path: Path, sha256: str | None, blob_id: str | None) -> None:
    expected = sha256 or blob_id
    if expected is None:
        return
    got = sha256_of(path) if sha256 else git_blob_sha1(path)
    if got != expected:
        raise UserError(
            "wrong digest",
            where=path,
            got=got,
            expected=expected,
            next_step=f"delete {path.resolve()} and run `dvc repro` again",
        )

"""Downloading a model repository with huggingface_hub, into its own cache, and checking what came."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_nf4.errors import UserError
from gptoss_nf4.source.model import HUB_PATTERNS
from gptoss_nf4.storage.machine import require_disk
from gptoss_nf4.storage.writing import CHUNK_BYTES, sha256_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


def download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Download `repository` and return (snapshot directory, commit).

    `revision` is a commit, branch or tag, None for the default branch; it is resolved to a commit first, so that the
    manifest records what was read. An interrupted download is taken up again. Every file's digest is compared with
    the hub's: SHA-256 for large files, git's blob SHA-1 for small ones.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

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
            next_step="check model.repository, or run `hf auth login`",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            "download failed",
            where=repository,
            got=_first_line(error),
            expected="every file of the repository",
            next_step="run `dvc repro` again; what is there already is kept",
        ) from None
    for sibling in info.siblings:
        path = directory / sibling.rfilename
        if path.is_file():
            _check(path, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)
    return directory, info.sha


def _require_room(info: "ModelInfo", repository: str) -> None:
    """Refuse a download that the cache's file system cannot hold; files that are there already count as room."""
    from huggingface_hub import constants, try_to_load_from_cache

    wanted = [f for f in info.siblings if f.size and any(Path(f.rfilename).match(pattern) for pattern in HUB_PATTERNS)]
    there = {
        f.rfilename for f in wanted if isinstance(try_to_load_from_cache(repository, f.rfilename, revision=info.sha), str)
    }
    needed = sum(f.size for f in wanted if f.rfilename not in there)
    require_disk(needed, Path(constants.HF_HUB_CACHE), f"the download of {repository}")


def git_blob_sha1(path: Path) -> str:
    """The id git gives the file's content, which the hub reports for files outside LFS."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""Where the files of a checkpoint lie that vLLM is given: a directory, or a repository in the Hub's cache."""

from pathlib import Path

from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.repository import is_repository


def directory_of(model: str, revision: str | None) -> Path | None:
    """The directory of `model`, which is a path or a Hub repository, if all of its weights are there, else None.

    Nothing is downloaded. A local directory counts by its index alone: what is missing in it is for the check to tell.
    """
    if (Path(model) / INDEX_FILE).is_file():
        return Path(model)
    if not is_repository(model):
        return None  # an address of a cloud store, or a path without an index
    snapshot = _snapshot(model, revision)
    if snapshot is None or not (snapshot / INDEX_FILE).is_file():
        return None
    files = set(read_json_object(snapshot / INDEX_FILE).get("weight_map", {}).values())
    return snapshot if all((snapshot / str(file)).is_file() for file in files) else None


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """The cached snapshot of a repository, whole or not; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Every file is left out: newer versions refuse a snapshot in which one that is asked for is missing.
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, ignore_patterns=["*"]))
    except LocalEntryNotFoundError:
        return None

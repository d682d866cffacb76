"""Uploading a proved checkpoint to the Hugging Face hub, in one commit.

One commit, so that nobody downloads half of it. Files that the hub has already are not sent again: an interrupted upload
goes on where it stopped, by whole files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.publish.card import metric, write_card
from gptoss_nf4.storage.artifacts import CARD, Artifacts
from gptoss_nf4.storage.digests import read_digests, verify
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.repository import OWNER_AND_NAME, digests

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

# What vLLM and transformers read in a repository. Files so called of an earlier checkpoint of ours are deleted there.
READ_BY_ENGINES = (".safetensors", ".json", ".jinja", ".bin")


def publish(
    artifacts: Artifacts,
    metrics: Path,
    repository: str,
    private: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Upload the checkpoint, its digests and its card to `repository`, and return the commit's address.

    The repository is made where there is none, and is private then if `private`. An existing one stays as it is: public or
    not. Afterwards the hub's digest of every file is compared with what was proved, else with that of our file.

    UserError where the checkpoint is not what was proved, where the repository is the source itself, and where it has
    weights that did not come from here: nothing is uploaded then. And where the upload fails.
    """
    if not OWNER_AND_NAME.fullmatch(repository):
        raise UserError(
            "bad setting",
            where="repository",
            got=repr(repository),
            expected="owner/name on the Hugging Face hub",
            next_step="pass repository=me/my-finetune",
        )
    require_proved_checkpoint(artifacts, metrics)
    _require_other_than_source(artifacts, repository)
    write_card(artifacts, metrics, repository)
    files = uploaded_files(artifacts)
    total = sum(path.stat().st_size for path in files.values())
    say(f"{len(files)} files, {total / 1e9:.2f} GB, to {repository}")
    commit = _commit(files, read_digests(artifacts.digest_list), artifacts.digest_list.name, repository, private)
    return str(commit.commit_url)


def require_proved_checkpoint(artifacts: Artifacts, metrics: Path) -> None:
    """UserError unless stage prove found this very checkpoint to be its source."""
    artifacts.require(artifacts.checkpoint, "assemble")
    recorded = artifacts.require(artifacts.digest_list, "prove")
    found = metric(artifacts, metrics / "exactness.json", "prove")
    if found["mode"] == "exact" and found["different"]:
        raise UserError(
            "not proved",
            where=metrics / "exactness.json",
            got=f"{found['different']} different values",
            expected="none",
            next_step="run `dvc repro -f prove`, which converts again",
        )
    verify(artifacts.checkpoint, recorded, next_step="run `dvc repro prove`, then publish again")


def _require_other_than_source(artifacts: Artifacts, repository: str) -> None:
    """UserError for the repository that was converted: the fine-tune in it would be replaced."""
    source = str(read_json_object(artifacts.manifest)["source"].get("repository"))
    if source.lower() == repository.lower():
        raise UserError(
            "that is the source",
            where="repository",
            got=repository,
            expected="another one than the fine-tune's own, which would be replaced",
            next_step=f"pass repository={repository}-nf4, for one",
        )


def _require_ours(there: list[str], digest_list: str, repository: str) -> None:
    """UserError for a repository with weights that were not uploaded from here: they would be replaced."""
    weights = [name for name in there if name.endswith((".safetensors", ".bin"))]
    if weights and digest_list not in there:
        raise UserError(
            "somebody else's weights",
            where=repository,
            got=f"{weights[0]}, and no {digest_list}",
            expected="a new repository, or one that publish.py filled",
            next_step="pass another repository=",
        )


def uploaded_files(artifacts: Artifacts) -> dict[str, Path]:
    """What is uploaded, by its name in the repository: the files that were proved, their digests, and the card."""
    files = {name: artifacts.checkpoint / name for name in read_digests(artifacts.digest_list)}
    return files | {artifacts.digest_list.name: artifacts.digest_list, CARD: artifacts.card}


def _commit(
    files: dict[str, Path], proved: dict[str, str], digest_list: str, repository: str, private: bool
) -> "CommitInfo":
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.list_repo_files(repository)
        _require_ours(there, digest_list, repository)
        stale = [name for name in there if name not in files and "/" not in name and name.endswith(READ_BY_ENGINES)]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message="Upload a checkpoint converted by gptoss-nf4",
        )
        _require_same(api, repository, commit.oid, files, proved)
    except (HTTPError, HFValidationError, OSError, RuntimeError) as error:
        # RuntimeError: huggingface_hub's for one file, with the reason as its cause.
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(
            "upload failed",
            where=repository,
            got=first_line(reason),
            expected="a repository that you may write to",
            next_step="check the name and the network, run `hf auth login`, and publish again; files that arrived are kept",
        ) from None
    return commit


def _require_same(api: "HfApi", repository: str, commit: str, files: dict[str, Path], proved: dict[str, str]) -> None:
    """UserError where the hub has another file at `commit` than it should have.

    That is what was proved, by SHA-256: it was compared with the files here before they were sent, so they are not read
    again. And a file that changed since is found. Where the hub has no SHA-256, or none was proved, it is our own file.
    """
    there = {each.rfilename: each for each in api.model_info(repository, revision=commit, files_metadata=True).siblings}
    for name, path in files.items():
        got: str | None
        if name not in there:
            got, expected = "no such file", "a file"
        elif there[name].lfs and name in proved:
            got, expected = there[name].lfs.sha256, proved[name]
        else:
            got, expected = digests(there[name], path)
        if got != expected:
            raise UserError(
                "upload is not the checkpoint",
                where=f"{repository} at {commit}: {name}",
                got=got,
                expected=expected,
                next_step="publish again",
            )

"""To whom a directory of artifacts belongs: the first source that took its name. No other source is converted into it."""

import os
from pathlib import Path

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json


def owner_of(artifacts: Artifacts) -> dict | None:
    """The origin of the source that `artifacts` belong to. None where no source has them."""
    if artifacts.origin.exists():
        return read_json_object(artifacts.origin)
    # Written by a version that had no such file.
    return read_json_object(artifacts.manifest)["source"] if artifacts.manifest.exists() else None


def same_source(one: dict, other: dict) -> bool:
    """Whether two origins are one source: one repository, or one directory whatever path leads to it."""
    if one.get("kind") != other.get("kind"):
        return False
    if one.get("kind") == "hub":
        return str(one.get("repository")).lower() == str(other.get("repository")).lower()
    if one.get("kind") != "local":
        return True
    paths = Path(str(one.get("path"))), Path(str(other.get("path")))
    return os.path.realpath(paths[0]) == os.path.realpath(paths[1]) or (
        all(path.exists() for path in paths) and paths[0].samefile(paths[1])
    )


def require_own(artifacts: Artifacts, origin: dict, setting: str = "model.name") -> None:
    """UserError where `artifacts` belong to another source than that of `origin`."""
    owner = owner_of(artifacts)
    if owner is not None and not same_source(owner, origin):
        raise UserError(
            "name taken",
            where=artifacts.root,
            got=f"{place_of(origin)} as its source",
            expected=f"{place_of(owner)}, whose artifacts these are",
            next_step=f"pass another {setting}=NAME; nothing is overwritten",
        )


def claim(artifacts: Artifacts, origin: dict) -> None:
    """Record that `artifacts` belong to the source of `origin`. UserError where they belong to another."""
    require_own(artifacts, origin)
    if not artifacts.origin.exists():
        write_json(artifacts.origin, origin)


def place_of(origin: dict) -> str:
    """A source's place, for messages."""
    return str(origin.get("path") or origin.get("repository") or f"the {origin.get('kind')} model")

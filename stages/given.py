"""Reading what the user gives as a model or an adapter: a directory, a Hub repository, or an adapter as the model."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from common import ROOT
from omegaconf import OmegaConf
from params import reading_conf
from settings import require_writable

from gptoss_nf4.errors import UserError
from gptoss_nf4.source.model import safe_model_name
from gptoss_nf4.storage.checkpoint import ADAPTER_CONFIG, is_adapter
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.repository import is_repository

ADAPTER_FIELDS = {"path": None, "repository": None, "revision": None, "any_base": False}
# An entry of what is typed as a mapping: a name, and a value up to the next name or the end. A value in quotes or braces
# ends where they do.
ENTRY = re.compile(
    r"""\s*([\w.-]+)\s*:\s*('(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|\{.*?\}|.*?)\s*(?:,(?=\s*[\w.-]+\s*:)|,?\s*$)""", re.DOTALL
)


def unquoted(given: str) -> str:
    """`given` without quotes around it, as Hydra's grammar asks for, unless something here is called so."""
    in_quotes = len(given) > 1 and given[0] == given[-1] and given[0] in "'\""
    return given[1:-1] if in_quotes and not os.path.lexists(given) else given


def directory_of(given: str, where: str) -> Path:
    """`given` as an absolute path. UserError, which names setting `where`, if it is no directory."""
    directory = Path(os.path.realpath(os.path.expanduser(unquoted(given))))
    if not os.path.isdir(directory):
        raise UserError(
            "no such directory",
            where=where,
            got=str(directory),
            expected="a directory, or a Hub repository as owner/name",
            next_step="check the path",
        )
    require_writable(where, str(directory))
    return directory


def adapter_entry(name: str, given: object) -> dict:
    """An entry of `adapters` with all its fields. `given`: a directory, a Hub repository or a mapping of some fields."""
    fields: dict = {}
    if isinstance(given, str):
        fields = {"repository": given} if is_repository(given) else {"path": given}
    elif isinstance(given, Mapping):
        fields = {key: value for key, value in given.items() if key != "defined_by"}
    one_place = bool(fields.get("path")) != bool(fields.get("repository"))
    any_base = fields.get("any_base", False)
    if not isinstance(any_base, bool):
        raise UserError(
            "bad setting",
            where=f"adapters.{name}.any_base",
            got=f"{any_base!r}",
            expected="true or false",
            next_step=f"pass adapters.{name}.any_base=true to accept an adapter of another base",
        )
    if fields.get("path") and fields.get("revision"):
        raise UserError(
            "bad setting",
            where=f"adapters.{name}.revision",
            got=f"{fields['revision']!r}",
            expected="none, since a directory has no revisions",
            next_step=f"name a Hub repository, or pass adapters.{name}.revision=null",
        )
    if set(fields) - set(ADAPTER_FIELDS) or not one_place or name != safe_model_name(name):
        raise UserError(
            "bad setting",
            where=f"adapters.{name}",
            got=f"{given!r}",
            expected="a name of letters, digits, '.', '_' and '-', and a directory or a Hub repository",
            next_step="pass 'adapters={mine: /data/my-lora}'",
        )
    if fields.get("path"):
        fields["path"] = str(directory_of(fields["path"], f"adapters.{name}"))
    # A dependency of stage adapter. DVC wants a path; a repository has none here, and its entry is in the stage's params.
    return ADAPTER_FIELDS | fields | {"defined_by": fields.get("path") or "conf/config.yaml"}


def adapters_typed(text: str) -> dict:
    """What is typed for `adapters`: `{mine: /data/my lora, theirs: someone/their-lora}`, or nothing.

    Values need quotes only where they contain `, name:`.
    """
    value = adapter_typed(text)
    if isinstance(value, str):
        raise _no_entry(value)
    return value


def adapter_typed(text: str) -> str | dict:
    """What is typed for one adapter: a place, whatever it contains, in quotes or without, or a mapping in braces."""
    bare = text.strip()
    if bare in ("", "null"):
        return {}
    if bare[0] != "{" or bare[-1] != "}":
        return unquoted(text)
    found, at, inside = {}, 0, bare[1:-1]
    while inside[at:].strip():
        entry = ENTRY.match(inside, at)
        if entry is None:
            raise _no_entry(inside[at:])
        value = adapter_typed(entry[2])
        found[entry[1]], at = {"true": True, "false": False}.get(str(value), value), entry.end()
    return found


def _no_entry(got: str) -> UserError:
    return UserError(
        "bad setting",
        where="adapters",
        got=repr(got),
        expected="NAME: DIRECTORY, or NAME: OWNER/NAME of a Hub repository",
        next_step="pass 'adapters={mine: /data/my-lora}', or adapters.mine=/data/my-lora",
    )


def adapter_as_model(directory: Path, base: str | None) -> tuple[str, list[str]] | None:
    """(the adapter's name, overrides that choose its base) if `directory` holds an adapter, else None.

    `base` is what the user says. Where that is None, adapter_config.json decides; UserError where it names no base.
    """
    if not is_adapter(directory):
        return None
    base = base or read_json_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            "adapter without a base",
            where=directory / ADAPTER_CONFIG,
            got="no base_model_name_or_path",
            expected="the model that it was trained on",
            next_step="pass model.base=DIRECTORY, or model.base=unsloth/gpt-oss-20b-unsloth-bnb-4bit",
        )
    if is_repository(base):
        return adapter_name(str(directory)), repository_as_model(base)
    return adapter_name(str(directory)), ["model=local", f"model.path={_base_directory(base, directory)}"]


def adapter_name(place: str) -> str:
    """What the adapter at `place`, a directory or a Hub repository, is called."""
    *above, name = [part for part in place.split("/") if part] or ["adapter"]
    if above and re.fullmatch(r"checkpoint-\d+", name):  # a trainer's: the directory above says of what
        name = f"{above[-1]}-{name}"
    return safe_model_name(name)


def repository_as_model(repository: str) -> list[str]:
    """The overrides that choose a Hub repository as the model: by its name in conf/model/ where it has one."""
    for group in sorted((ROOT / "conf/model").glob("*.yaml")):
        with reading_conf():
            known = OmegaConf.load(group).get("repository")
        if known == repository:
            return [f"model={group.stem}"]
    return ["model=hub", f"model.repository={repository}"]


def _base_directory(base: str, adapter: Path) -> Path:
    """The directory of an adapter's base. UserError where it is not on this machine."""
    directory = Path(os.path.realpath(os.path.expanduser(unquoted(base))))
    if not os.path.isdir(directory):
        raise UserError(
            "no base for the adapter",
            where=adapter,
            got=f"the base {base!r}, which is not here",
            expected="a directory on this machine, or a Hub repository as owner/name",
            next_step="pass model.base=DIRECTORY, or `make convert MODEL=... BASE=DIRECTORY`",
        )
    return directory

"""The `model` and `adapters` sections of the settings, and finding what stages fetch and adapter brought."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.side_files import TEMPLATE, TEMPLATE_DIRECTORY
from gptoss_nf4.storage.artifacts import CARD, Artifacts
from gptoss_nf4.storage.checkpoint import ADAPTER_CONFIG
from gptoss_nf4.storage.reading import read_json_object

EMBEDDED_KINDS = ("embedded", "embedded_massive", "embedded_fused")
SYNTHETIC_KINDS = ("synthetic", "synthetic_fused")
SAMPLE_KINDS = (*EMBEDDED_KINDS, *SYNTHETIC_KINDS)  # stage fetch writes these itself, into the artifacts
KINDS = (*SAMPLE_KINDS, "hub", "local")
# kind -> the field that it cannot do without
NEEDED = {"local": "path", "hub": "repository", **dict.fromkeys(SYNTHETIC_KINDS, "dimensions")}

MAX_NAME_BYTES = 200  # a file system takes 255

# The files of a repository that a conversion reads, and its card, which names the licence. Pickled weights and code are
# never downloaded.
HUB_PATTERNS = ("*.safetensors", "*.json", TEMPLATE, f"{TEMPLATE_DIRECTORY}/*.jinja", CARD)


@dataclass(frozen=True)
class Model:
    """Which source to convert; `name` also names the artifacts.

    `path` counts for kind local, `repository` and `revision` for hub, `dimensions` for synthetic ones. UserError for an
    unknown kind, and for one without what it needs.
    """

    name: str
    kind: str
    path: str | None = None
    repository: str | None = None
    revision: str | None = None
    dimensions: Dimensions | None = None
    expected: str | None = None  # path of a `sha256sum` list that the source's files must match

    def __post_init__(self) -> None:
        needed = NEEDED.get(self.kind)
        bad_kind, nothing = self.kind not in KINDS, needed is not None and not getattr(self, needed)
        if bad_kind or nothing:
            raise UserError(
                "bad setting",
                where="model.kind" if bad_kind else f"model.{needed}",
                got=repr(self.kind) if bad_kind else "nothing",
                expected=f"one of {KINDS}" if bad_kind else f"the {needed} of a model of kind {self.kind}",
                next_step="run `python stages/configure.py`, which makes params.yaml",
            )
        check_model_name(self.name, "model.name")

    @property
    def origin(self) -> dict:
        """What tells this source from others, as JSON has it: see `origin_of`."""
        return origin_of(self.kind, self.path, self.repository)


def origin_of(kind: str, path: str | None, repository: str | None) -> dict:
    """A source's kind, and the place that it comes from: `path` for kind local, `repository` for hub."""
    if kind == "hub":
        return {"kind": kind, "repository": repository}
    return {"kind": kind} | ({"path": os.path.realpath(str(path))} if kind == "local" else {})


@dataclass(frozen=True)
class AdapterSource:
    """An entry of `adapters` in the settings: a directory, or a repository of the Hugging Face hub."""

    name: str
    path: str | None = None
    repository: str | None = None
    revision: str | None = None
    any_base: bool = False  # accept the adapter though it was trained on other weights

    def __post_init__(self) -> None:
        check_model_name(self.name, "adapters")


def open_source(model: Model, artifacts: Artifacts) -> Source:
    """Open the source that stage fetch brought and validated. UserError where fetch has not run or the source is gone."""
    return open_checkpoint(source_directory(model, artifacts))


def source_directory(model: Model, artifacts: Artifacts) -> Path:
    """Where the source lies that stage fetch brought. UserError where fetch has not run or the source is gone."""
    manifest = read_json_object(artifacts.require(artifacts.manifest, "fetch"))
    directory = _directory(model, artifacts, manifest)
    if not directory.is_dir():
        raise UserError(
            "missing source",
            where=directory,
            got="no such directory",
            expected=f"the checkpoint of model {model.name}",
            next_step="put it back, or configure with another model.path" if model.path else "run `dvc repro -s -f fetch`",
        )
    return directory


def _directory(model: Model, artifacts: Artifacts, manifest: dict) -> Path:
    if model.kind == "hub":
        return hub_snapshot(str(model.repository), manifest["source"]["commit"])
    return artifacts.source if model.kind in SAMPLE_KINDS else Path(str(model.path))


def adapter_directory(source: AdapterSource, artifacts: Artifacts) -> Path:
    """The directory of an adapter, as it was saved. UserError where stage adapter has not checked it, or it is gone."""
    description = read_json_object(artifacts.require(artifacts.adapter(source.name), f"adapter@{source.name}"))
    if source.path:
        return Path(source.path)
    return hub_snapshot(str(source.repository), description["source"]["commit"])


def hub_snapshot(repository: str, commit: str) -> Path:
    """The directory of a commit in the hub's cache, without asking the network. UserError where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repository, revision=commit, allow_patterns=list(HUB_PATTERNS), local_files_only=True)
        )
    except LocalEntryNotFoundError:
        raise UserError(
            "missing source",
            where="the Hugging Face cache",
            got=f"no {repository} at {commit}",
            expected="its snapshot",
            next_step="run `dvc repro -s -f fetch`",
        ) from None


def base_on_hub(repository: str, revision: str | None) -> str | None:
    """What the repository of an adapter names as its base. None for a repository that holds a model, or is not there.

    Only what says so counts: a config.json, which some trainers write beside an adapter too, makes it a model.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(repository, "config.json", revision=revision)
    except LocalEntryNotFoundError:  # no network
        return None
    except EntryNotFoundError:
        try:
            found = read_json_object(Path(hf_hub_download(repository, ADAPTER_CONFIG, revision=revision)))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            return None
        base = found.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
    return None


def hub_config(repository: str, revision: str | None) -> Path:
    """Download the repository's config.json into the hub's cache and return its path. UserError where that fails."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            "cannot read the repository's config.json",
            where="Hugging Face",
            got=first_line(error),
            expected=f"config.json of {repository}",
            next_step="check the name and the network, or run `hf auth login`",
        ) from None


def safe_model_name(text: str) -> str:
    """`text` as a directory name for the artifacts: other characters than letters, digits, `.`, `_` and `-` become `-`.

    Letters are those of any alphabet. What is longer than MAX_NAME_BYTES is cut.
    """
    return re.sub(r"[^\w.-]+", "-", text).strip(".-").encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "model"


def check_model_name(name: str, where: str) -> None:
    """UserError, which names setting `where`, if `name` is no directory's name or leads out of the artifacts."""
    if not isinstance(name, str) or name != safe_model_name(name):  # params.yaml may hold a number
        raise UserError(
            "bad setting",
            where=where,
            got=repr(name),
            expected="a name of letters, digits, '.', '_' and '-' that names a directory below artifacts/",
            next_step=f"call it {safe_model_name(str(name))}",
        )

"""Write params.yaml: python stages/configure.py [model=...] [engine=...] [key=value ...]

model=NAME starts from the defaults in conf/. Without it, only what is named changes. Without arguments, all goes back to
the embedded model. Values are taken as the shell passes them.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checks import CHECKS, bad, check, mapping, one_of
from common import METRICS, ROOT
from given import adapter_as_model, adapter_entry, adapter_name, adapter_typed, adapters_typed, directory_of, unquoted
from hydra import compose, initialize_config_dir
from merging import merge_input, suffix_of
from naming import free_adapter_name, free_name, require_free_name, require_own_adapter
from omegaconf import DictConfig, OmegaConf
from params import PARAMS, broken, read_params, reading_conf
from settings import no_setting, put, require_writable, split, value_of

from gptoss_nf4.convert.plan import MODES
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.owner import claim
from gptoss_nf4.source.layouts import layer_count
from gptoss_nf4.source.model import check_model_name, hub_config, origin_of
from gptoss_nf4.source.refused import require_checkpoint, require_directory
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.repository import is_repository
from gptoss_nf4.storage.writing import write_text

HEADER = "# Made from conf/ by `python stages/configure.py`; change values there, or pass them to it.\n"
GROUPS = ("model", "engine")
MISSING = "???"  # OmegaConf's mark of a value that the user has to give
# What the user has to give with model=local and with model=hub.
REQUIRED = {"path": "the directory of a checkpoint", "repository": "a Hub repository as owner/name"}
# The models for which a setting has a meaning. The others of `model` are for all, or chosen by `model=`.
ONLY_FOR = {
    "model.path": ("local",),
    "model.base": ("local",),
    "model.repository": ("hub",),
    "model.revision": ("hub", "gpt_oss_20b", "gpt_oss_120b"),
    "model.layers": ("synthetic_20b", "synthetic_120b"),
    "model.kind": (),
    "model.defined_by": (),
}

# Settings that follow from others -> what the user gives instead.
DERIVED = {"merge_input": "requant.merge=NAME", "adapter_reports": "adapters.NAME=DIRECTORY"}


def composed(typed: Sequence[str], current: dict | None = None, adapters: Sequence[str] = ()) -> DictConfig:
    """The settings after typing `typed`. UserError for a bad one.

    `adapters` are directories and Hub repositories of adapters that get a name here.

    They start from `current`, which is params.yaml, where that is given and no model is named; else from conf/. Name and
    layers of a model that conf/ does not know are read from the model. Where model.path is an adapter, its base becomes the
    model and the adapter is added to `adapters`.
    """
    given = split(typed)
    chosen = {group: given.pop(group) for group in GROUPS if group in given}
    settings = _start(chosen, current)
    mapping("requant", settings["requant"])
    if merged := settings["requant"]["merge"]:
        settings["model"]["name"] = str(settings["model"]["name"]).removesuffix(suffix_of(merged))  # which `_name` adds
    _require_meaning(given, settings)
    if {"model.path", "model.repository"} & given.keys():
        settings["model"] |= {"name": None, "layers": None}  # those of another source
    for key, text in given.items():
        if key == "adapters":
            settings["adapters"] = adapters_typed(text)
        elif key.startswith("adapters."):
            _put_adapter(settings, key, text)
        else:
            put(settings, key, value_of(key, text))
    _require_place(settings["model"])
    for key in ("model.path", "model.repository"):  # before they are looked for
        CHECKS[key](key, settings["model"][key.partition(".")[2]])
    adapter = None
    if settings["model"]["kind"] == "local":
        directory = Path(os.path.realpath(require_directory(unquoted(settings["model"]["path"]))))
        adapter = adapter_as_model(directory, settings["model"]["base"])
        if adapter is None:
            require_checkpoint(directory)
            settings["model"] |= {"path": str(directory), "defined_by": str(directory), "layers": _layers(directory)}
        else:
            settings["model"] = _base_of(directory, adapter[1], given)
    elif settings["model"]["layers"] is None:
        repository, revision = settings["model"]["repository"], settings["model"]["revision"]
        settings["model"]["layers"] = _layers(hub_config(repository, revision).parent)
    _name(settings["model"], settings["requant"]["merge"])
    check(settings, CHECKS | {"requant.mode": one_of(MODES)})
    artifacts = Artifacts.of(settings["model"]["name"])
    if adapter is not None:
        name = free_adapter_name(adapter[0], str(directory), artifacts, settings["adapters"])
        print(f"{directory} is an adapter, called {name} here; its base is converted ({' '.join(adapter[1])})")
        settings["adapters"][name] = {"path": str(directory)}
    for given_place in adapters:
        place = given_place if is_repository(given_place) else str(directory_of(given_place, "ADAPTER"))
        settings["adapters"][free_adapter_name(adapter_name(place), place, artifacts, settings["adapters"])] = place
    settings["adapters"] = {name: adapter_entry(name, entry) for name, entry in settings["adapters"].items()}
    for name, entry in settings["adapters"].items():
        require_own_adapter(name, entry, artifacts)
    settings["merge_input"] = merge_input(settings["requant"], settings["adapters"], artifacts)
    settings["adapter_reports"] = str(METRICS / "adapters") if settings["adapters"] else "stages/report.py"
    require_writable("params.yaml", settings)
    return OmegaConf.create(settings)


def _base_of(directory: Path, base: list[str], given: dict[str, str]) -> dict:
    """The `model` section for the base of the adapter in `directory`, which `base` chooses."""
    found = composed([*base, *(f"{key}={given[key]}" for key in ("model.name", "model.expected") if key in given)])
    if found.adapters:
        raise UserError(
            "adapter on an adapter",
            where=directory,
            got=f"a base that is an adapter itself ({' '.join(base)})",
            expected="a checkpoint",
            next_step="pass model.base=DIRECTORY of the checkpoint that both were trained on",
        )
    return dict(OmegaConf.to_container(found)["model"])


def _start(chosen: dict[str, str], current: dict | None) -> dict:
    """The settings before any key is set."""
    for group, name in chosen.items():
        one_of(sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")))(group, name)
    if current is None or "model" in chosen:
        return _from_conf(chosen)
    defaults = _from_conf({"model": _group_of(current["model"])} | chosen)
    settings = _completed(current, defaults)
    return settings | {"engine": defaults["engine"]} if "engine" in chosen else settings


def _completed(current: dict, defaults: dict) -> dict:
    """`current` with what a newer conf/ has beside it. UserError for a key that conf/ does not have."""
    settings = {}
    for section, default in defaults.items():
        value = current.get(section, default)
        sections = isinstance(default, dict) and isinstance(value, dict) and section != "adapters"
        settings[section] = default | value if sections else value
        unknown = sorted(map(str, value.keys() - default.keys())) if sections else []
        for key in unknown:
            raise no_setting(f"{section}.{key}", default)
    for key in sorted(map(str, current.keys() - defaults.keys())):
        raise no_setting(key, defaults)
    mapping("adapters", settings["adapters"] or {})
    return settings | {"adapters": {str(name): entry for name, entry in (settings["adapters"] or {}).items()}}


def _from_conf(chosen: dict[str, str]) -> dict:
    """conf/ with the chosen models and engines. UserError where a file there is broken."""
    with reading_conf(), initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"{group}={name}" for group, name in chosen.items()])
        settings = OmegaConf.to_container(cfg)
    if not isinstance(settings, dict) or not all(isinstance(settings.get(group), dict) for group in GROUPS):
        raise bad("conf/", settings, "sections for model and engine", "restore the files there: `git checkout conf`")
    return settings | {"adapters": settings.get("adapters") or {}}


def _group_of(model: dict) -> str:
    """The name of the file in conf/model/ that the `model` section of params.yaml came from."""
    return "local" if model["kind"] == "local" else Path(model["defined_by"]).stem


def _require_meaning(given: dict[str, str], settings: dict) -> None:
    """UserError for a key that would be ignored: one of `model` that the chosen model has no use for, or a derived one."""
    for key, sets_it in DERIVED.items():
        if key in given:
            raise bad(key, given[key], f"{sets_it}, which sets it too")
    group = _group_of(settings["model"])
    for key in given.keys() & ONLY_FOR.keys():
        if group not in ONLY_FOR[key]:
            models = " or ".join(f"model={each}" for each in ONLY_FOR[key][:2])
            raise bad(
                key,
                given[key],
                f"{models or 'model=NAME'}, not model={group}",
                f"name the model too: {models or 'model=NAME'}",
            )


def _put_adapter(settings: dict, key: str, text: str) -> None:
    """Set an adapter, or a field of it. Nothing, or null, takes the adapter away."""
    name = key.removeprefix("adapters.")
    entry, _, field = name.rpartition(".")
    if entry in settings["adapters"] and field in settings["adapters"][entry]:
        settings["adapters"][entry] |= {field: {"true": True, "false": False, "null": None}.get(text, text)}
    elif value := adapter_typed(text):
        settings["adapters"][name] = value
    else:
        settings["adapters"].pop(name, None)


def _require_place(model: dict) -> None:
    for key, expected in REQUIRED.items():
        if model.get(key) == MISSING or (model["kind"] == "local" and key == "path" and not model["path"]):
            raise UserError(
                "bad setting",
                where=f"model.{key}",
                got="nothing",
                expected=expected,
                next_step=f"run `python stages/configure.py model={model['kind']} model.{key}=...`",
            )


def _layers(directory: Path) -> list[int]:
    return list(range(layer_count(directory)))


def _name(model: dict, merge: str | None) -> None:
    """Set the model's name, where conf/ and the user have none, and refuse that of another source.

    Where adapter `merge` is merged, that is in the name, so that the result does not take the place of the unmerged one.
    """
    group = _group_of(model)
    reserved = {path.stem for path in (ROOT / "conf/model").glob("*.yaml")} - {group}
    origin = _origin(model)
    if model["name"] is None and group in ("local", "hub"):
        model["name"] = free_name(str(model["path"] or model["repository"]), origin, reserved)
    else:
        check_model_name(str(model["name"] or ""), "model.name")
        require_free_name(model["name"], origin, reserved)
    if merge:
        check_model_name(str(merge), "requant.merge")
        model["name"] += suffix_of(merge)
        require_free_name(model["name"], origin, reserved)


def _origin(model: Mapping) -> dict:
    return origin_of(model["kind"], model["path"], model["repository"])


def current() -> dict | None:
    """What params.yaml holds; None where there is none. UserError where that is no set of settings."""
    if not PARAMS.exists():
        return None
    found = read_params()
    try:
        _group_of(found["model"])
    except (TypeError, KeyError):
        raise broken("a model without kind and defined_by") from None
    return found


def configure(typed: Sequence[str], adapters: Sequence[str] = ()) -> DictConfig:
    """Write params.yaml after typing `typed`, and return what it holds. See `composed` for `adapters` and errors."""
    bare = bool(typed) and not any(argument.startswith("model=") for argument in typed)
    cfg = composed(typed, current() if bare else None, adapters)
    write_text(PARAMS, HEADER + OmegaConf.to_yaml(cfg))
    claim(Artifacts.of(cfg.model.name), _origin(cfg.model))
    return cfg


def said(cfg: DictConfig) -> str:
    """The settings in one line, for the user."""
    line = f"params.yaml: model {cfg.model.name}, {len(cfg.model.layers)} layers, {cfg.dtype}, engine {cfg.engine.name}"
    line += f", adapters {', '.join(cfg.adapters)}" if cfg.adapters else ""
    return line + (f", {cfg.requant.merge} merged" if cfg.requant.merge else "")


def main() -> None:
    typed = sys.argv[1:]
    if {"-h", "--help"} & set(typed):
        print(__doc__)
        return
    try:
        print(said(configure(typed)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Compose conf/ into params.yaml: python stages/configure.py [model=...] [engine=...] [key=value ...]"""

import sys
from pathlib import Path

from common import ROOT
from given import adapter_as_model, adapter_entry, directory_of
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.source.layouts import layer_count
from gptoss_nf4.source.model import hub_config, safe_model_name
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.writing import write_text

HEADER = "# Made from conf/ by `python stages/configure.py`; change values there, or pass them to it.\n"
# What the user has to give with model=local and with model=hub.
REQUIRED = {"path": "the directory of a checkpoint", "repository": "a Hub repository as owner/name"}


def composed(overrides: list[str]) -> DictConfig:
    """conf/ with `overrides`, resolved, and prepared for a merge where `requant.merge` asks for one.

    UserError for a bad setting.
    """
    cfg = _resolved(overrides)
    if cfg.requant.merge is not None:
        prepare_merge(cfg)
    return cfg


def prepare_merge(cfg: DictConfig) -> None:
    """Give the merged result a name of its own, and its stages the adapter as a dependency.

    UserError for an adapter that `adapters` does not have, and for a mode that cannot hold merged weights.
    """
    cfg.requant.merge = name = str(cfg.requant.merge)
    if name not in cfg.adapters:
        raise UserError(
            "no such adapter",
            where="requant.merge",
            got=repr(name),
            expected=f"one of adapters, {sorted(cfg.adapters)}" if cfg.adapters else "an adapter, and adapters has none",
            next_step=f"pass 'adapters={{{name}: DIRECTORY}}'",
        )
    RequantOptions.of(cfg.requant)
    cfg.model.name = f"{cfg.model.name}-{name}"
    cfg.merge_input = str(Artifacts.of(cfg.model.name).adapter(name))


def _resolved(overrides: list[str]) -> DictConfig:
    """conf/ with `overrides`, resolved. UserError for a bad setting.

    Name and layers of a model that conf/ does not know are read from the model. Where model.path is an adapter, its base
    becomes the model and the adapter is added to `adapters`.
    """
    cfg = _compose(overrides)
    for key, expected in REQUIRED.items():
        if OmegaConf.is_missing(cfg.model, key):
            raise UserError(
                "bad setting",
                where=f"model.{key}",
                got="nothing",
                expected=expected,
                next_step=f"run `python stages/configure.py model={cfg.model.kind} model.{key}=...`",
            )
    if cfg.model.kind == "local":
        directory = directory_of(cfg.model.path, "model.path")
        adapter = adapter_as_model(directory, cfg.model.base)
        if adapter is not None:
            name, base = adapter
            print(f"{directory} is an adapter, called {name} here; its base is converted ({' '.join(base)})")
            others = [each for each in overrides if not each.startswith(("model=", "model.path=", "model.base="))]
            cfg = _resolved([*base, *others])
            cfg.adapters = OmegaConf.to_container(cfg.adapters) | {name: adapter_entry(name, str(directory))}
            return cfg
        cfg.model.path = str(directory)
        cfg.model.layers = list(range(layer_count(directory)))
        cfg.model.name = safe_model_name(cfg.model.name or directory.name)
    if cfg.model.kind == "hub" and cfg.model.layers is None:
        cfg.model.layers = list(range(layer_count(hub_config(cfg.model.repository, cfg.model.revision).parent)))
        cfg.model.name = safe_model_name(cfg.model.name or Path(cfg.model.repository).name)
    cfg.adapters = {name: adapter_entry(name, given) for name, given in (cfg.adapters or {}).items()}
    OmegaConf.resolve(cfg)
    return cfg


def _compose(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides)


def main() -> None:
    try:
        cfg = composed(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    write_text(Path("params.yaml"), HEADER + OmegaConf.to_yaml(cfg))
    line = f"params.yaml: model {cfg.model.name}, {len(cfg.model.layers)} layers, {cfg.dtype}, engine {cfg.engine.name}"
    line += f", adapters {', '.join(cfg.adapters)}" if cfg.adapters else ""
    print(line + (f", {cfg.requant.merge} merged" if cfg.requant.merge else ""))


if __name__ == "__main__":
    main()

"""Compose conf/ into params.yaml: python stages/configure.py [model=...] [engine=...] [key=value ...]"""

import sys
from pathlib import Path

from common import ROOT
from given import adapter_as_model, adapter_entry
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptoss_nf4.errors import UserError
from gptoss_nf4.source.layouts import layer_count
from gptoss_nf4.source.model import hub_config, safe_model_name
from gptoss_nf4.source.refused import require_checkpoint, require_directory
from gptoss_nf4.storage.writing import write_text

HEADER = "# Made from conf/ by `python stages/configure.py`; change values there, or pass them to it.\n"
# What the user has to give with model=local and with model=hub.
REQUIRED = {"path": "the directory of a checkpoint", "repository": "a Hub repository as owner/name"}


def composed(overrides: list[str]) -> DictConfig:
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
        directory = require_directory(cfg.model.path).resolve()
        adapter = adapter_as_model(directory, cfg.model.base)
        if adapter is not None:
            name, base = adapter
            print(f"{directory} is an adapter, called {name} here; its base is converted ({' '.join(base)})")
            others = [each for each in overrides if not each.startswith(("model=", "model.path=", "model.base="))]
            cfg = composed([*base, *others])
            cfg.adapters = OmegaConf.to_container(cfg.adapters) | {name: adapter_entry(name, str(directory))}
            return cfg
        require_checkpoint(directory)
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
    print(line + (f", adapters {', '.join(cfg.adapters)}" if cfg.adapters else ""))


if __name__ == "__main__":
    main()

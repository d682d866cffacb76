"""Compose conf/ into params.yaml: python stages/configure.py [model=...] [engine=...] [key=value ...]"""

import re
import sys
from pathlib import Path

from common import ROOT
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptoss_nf4.errors import UserError
from gptoss_nf4.source.layouts import layer_count
from gptoss_nf4.source.model import safe_model_name
from gptoss_nf4.storage.writing import write_text

HEADER = "# Made from conf/ by `python stages/configure.py`; change values there, or pass them to it.\n"


REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ADAPTER_FIELDS = {"path": None, "repository": None, "revision": None, "any_base": False}


def adapter_entry(name: str, given: object) -> dict:
    """An entry of `adapters` with all its fields, from a directory, a Hub repository or a mapping of fields."""
    fields = dict(given) if isinstance(given, DictConfig) else {}
    if isinstance(given, str):
        directory = Path(given).expanduser()
        is_repository = REPOSITORY.fullmatch(given) and not directory.exists()
        fields = {"repository": given} if is_repository else {"path": given}
    unknown = set(fields) - set(ADAPTER_FIELDS)
    if unknown or bool(fields.get("path")) == bool(fields.get("repository")) or name != safe_model_name(name):
        raise UserError(
            "bad setting",
            where=f"adapters.{name}",
            got=f"{given!r}",
            expected="a name of letters, digits, '.', '_' and '-', and a directory or a Hub repository",
            next_step="pass 'adapters={mine: /data/my-lora}'",
        )
    if fields.get("path"):
        fields["path"] = str(Path(fields["path"]).expanduser().resolve())
    # What makes stage adapter run again: the directory, or for a repository the entry itself.
    return ADAPTER_FIELDS | fields | {"defined_by": fields.get("path") or "conf/config.yaml"}


def composed(overrides: list[str]) -> DictConfig:
    """conf/ with overrides, resolved; a local model's name and layers are read from its directory."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides)
    if cfg.model.kind == "local":
        if OmegaConf.is_missing(cfg.model, "path"):
            raise UserError(
                "bad setting",
                where="model.path",
                got="nothing",
                expected="the directory of a checkpoint",
                next_step="run `python stages/configure.py model=local model.path=DIRECTORY`",
            )
        directory = Path(cfg.model.path).expanduser().resolve()
        cfg.model.path = str(directory)
        cfg.model.layers = list(range(layer_count(directory)))
        cfg.model.name = safe_model_name(cfg.model.name or directory.name)
    cfg.adapters = {name: adapter_entry(name, given) for name, given in (cfg.adapters or {}).items()}
    OmegaConf.resolve(cfg)
    return cfg


def main() -> None:
    try:
        cfg = composed(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    write_text(Path("params.yaml"), HEADER + OmegaConf.to_yaml(cfg))
    print(f"params.yaml: model {cfg.model.name}, {len(cfg.model.layers)} layers, {cfg.dtype}, engine {cfg.engine.name}")


if __name__ == "__main__":
    main()

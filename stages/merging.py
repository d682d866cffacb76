"""The adapter that `requant.merge` names: what it means for the settings, and for the stages that read it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from common import adapter_named
from omegaconf import DictConfig

from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.model import adapter_directory
from gptoss_nf4.storage.artifacts import Artifacts

if TYPE_CHECKING:
    from gptoss_nf4.convert.merge import Merge


def merge_of(cfg: DictConfig, source: Source, artifacts: Artifacts) -> "Merge | None":
    """The adapter on its base `source`; None where none is merged. Only where one is, torch is imported."""
    if cfg.requant.merge is None:
        return None
    expected = merge_input(cfg.requant, cfg.adapters, artifacts)
    if cfg.merge_input != expected:  # an experiment, or a hand, set the one without the other
        raise UserError(
            "bad setting",
            where="requant.merge",
            got=f"{cfg.requant.merge} with merge_input={cfg.merge_input}",
            expected=f"merge_input={expected}, without which a changed adapter is not merged again",
            next_step=f"run `python stages/configure.py requant.merge={cfg.requant.merge}`, which sets both and the name",
        )
    from gptoss_nf4.adapters.adapter import Adapter
    from gptoss_nf4.convert.merge import Merge

    directory = adapter_directory(adapter_named(cfg, cfg.requant.merge), artifacts)
    return Merge(Adapter(directory), source.dimensions)


def suffix_of(merge: str) -> str:
    """What the name of a merged result has more than the base's."""
    return f"-{merge}"


def merge_input(requant: Mapping, adapters: Mapping, artifacts: Artifacts) -> str:
    """What the stages depend on that read the merged adapter: see dvc.yaml.

    UserError for an adapter that `adapters` does not have, and for a mode that cannot hold merged weights.
    """
    name = requant["merge"]
    if name is None:
        return "stages/common.py"
    if name not in adapters:
        raise UserError(
            "no such adapter",
            where="requant.merge",
            got=repr(name),
            expected=f"one of adapters, {sorted(adapters)}" if adapters else "an adapter, and adapters has none",
            next_step=f"pass adapters.{name}=DIRECTORY too, or requant.merge= to merge none",
        )
    RequantOptions.of(requant)
    return str(artifacts.adapter(name))

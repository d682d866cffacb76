"""The adapter that `requant.merge` names, for the stages that read it."""

from typing import TYPE_CHECKING

from common import adapter_named
from omegaconf import DictConfig

from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.model import adapter_directory
from gptoss_nf4.storage.artifacts import Artifacts

if TYPE_CHECKING:
    from gptoss_nf4.convert.merge import Merge


def merge_of(cfg: DictConfig, source: Source, artifacts: Artifacts) -> "Merge | None":
    """The adapter on its base `source`; None where none is merged. Only where one is, torch is imported."""
    if cfg.requant.merge is None:
        return None
    from gptoss_nf4.adapters.adapter import Adapter
    from gptoss_nf4.convert.merge import Merge

    directory = adapter_directory(adapter_named(cfg, cfg.requant.merge), artifacts)
    return Merge(Adapter(directory), source.dimensions)

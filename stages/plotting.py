"""The data of the plots in dvc.yaml. They are no outputs: DVC misses an output that is not made yet, in all plots."""

from common import METRICS, PLOTS, adapters_of, model_of
from omegaconf import DictConfig

from gptoss_nf4.report.facts import Facts, gather
from gptoss_nf4.report.series import plotted
from gptoss_nf4.storage.writing import write_json


def draw(cfg: DictConfig) -> Facts:
    """Write what there is to draw of the model of params.yaml, nothing where there is nothing yet, and return all facts."""
    _, artifacts = model_of(cfg)
    facts = gather(artifacts, METRICS, len(cfg.model.layers), [adapter.name for adapter in adapters_of(cfg)])
    drawn = plotted(facts.layer_seconds, facts.sizes, facts.absmax, facts.positions, facts.benchmark)
    for name, points in drawn.items():
        write_json(PLOTS / name / "points.json", [{"model": facts.name, **point} for point in points])
    return facts

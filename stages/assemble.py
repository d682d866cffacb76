"""assemble: make the layers' tensors one checkpoint and audit its dtypes."""

from common import PLOTS, model_of, stage
from merging import merge_of
from omegaconf import DictConfig

from gptoss_nf4.check.audit import audit
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.report import series
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.writing import write_json


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    source = open_source(model, artifacts)
    assemble(source, artifacts, options, cfg.dtype, cfg.residual_scale, merge_of(cfg, source, artifacts))
    floating = audit(Checkpoint(artifacts.checkpoint), cfg.dtype)
    layers = source.dimensions.layers
    write_json(PLOTS / "size/layers.json", series.sizes(artifacts, layers))
    write_json(PLOTS / "absmax/layers.json", series.absmax(series.reports_of(artifacts, layers)))
    write_json(PLOTS / "seconds/layers.json", series.seconds(artifacts, layers))  # of this machine: no output of DVC's
    return f"{artifacts.checkpoint}, {sum(floating.values())} tensors in {cfg.dtype}"


if __name__ == "__main__":
    main()

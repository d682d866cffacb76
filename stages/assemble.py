"""assemble: make the layers' tensors one checkpoint and audit its dtypes."""

from common import model_of, stage
from merging import merge_of
from omegaconf import DictConfig
from plotting import draw

from gptoss_nf4.check.audit import audit
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    source = open_source(model, artifacts)
    assemble(source, artifacts, options, cfg.dtype, cfg.residual_scale, merge_of(cfg, source, artifacts))
    floating = audit(Checkpoint(artifacts.checkpoint), cfg.dtype)
    draw(cfg)
    return f"{artifacts.checkpoint}, {sum(floating.values())} tensors in {cfg.dtype}"


if __name__ == "__main__":
    main()

"""assemble: make the layers' tensors one checkpoint and audit its dtypes."""

from common import model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.fetch.fetch import open_source


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    floating = assemble(open_source(model, artifacts), artifacts, options, cfg.dtype, cfg.residual_scale)
    return f"{artifacts.checkpoint}, {sum(floating.values())} tensors in {cfg.dtype}"


if __name__ == "__main__":
    main()

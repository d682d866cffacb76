"""assemble: make the layers' tensors one checkpoint, audit it and prove it exact."""

from common import METRICS, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.convert import assemble_step, require_exact
from gptoss_nf4.fetch import open_source
from gptoss_nf4.files import write_json
from gptoss_nf4.plan import RequantOptions


@stage
def main(cfg: DictConfig) -> None:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    report = assemble_step(open_source(model, artifacts), artifacts, options, cfg.dtype)
    write_json(METRICS / "exactness.json", {"model": model.name, "mode": options.mode, "dtype": cfg.dtype, **report})
    require_exact(report, options, artifacts)
    print(f"assemble: {artifacts.checkpoint}, {report['compared']} weights compared, {report['different']} different")


if __name__ == "__main__":
    main()

"""normalize: bring every tensor that is not 4-bit to one dtype."""

from common import METRICS, model_of, stage
from merging import merge_of
from omegaconf import DictConfig

from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.writing import write_json


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    source = open_source(model, artifacts)
    merge = merge_of(cfg, source, artifacts)
    report = normalize(source, artifacts, options, cfg.dtype, cfg.residual_scale, merge)
    write_json(METRICS / "dtypes.json", {"model": model.name, **report})
    for name in report["joined_dense"]:
        print(f"normalize: {name} has 4-bit and 16-bit parts and is served dense")
    scale = report["scaling"]["residual_scale"]
    return f"{report['cast_values']} values to {cfg.dtype}, {report['underflow']} became zero, residual_scale {scale:g}"


if __name__ == "__main__":
    main()

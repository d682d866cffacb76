"""prove: compare every tensor with the source's, codes through bitsandbytes, and record the digest of every file."""

from common import METRICS, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.proof.config import Asked
from gptoss_nf4.proof.prove import prove, require_proved
from gptoss_nf4.source.model import source_directory
from gptoss_nf4.storage.digests import write_digests
from gptoss_nf4.storage.writing import write_json


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    source, checkpoint = source_directory(model, artifacts), artifacts.require(artifacts.checkpoint, "assemble")
    settings = {key: cfg.requant[key] for key in ("mode", "w13_order", "quant_type", "blocksize")}
    asked = Asked(dtype=cfg.dtype, residual_scale=cfg.residual_scale, **settings)
    found = prove(source, checkpoint, asked, say=lambda line: print(f"prove: {line}", flush=True))
    described = {"model": model.name, "mode": asked.mode, "dtype": asked.dtype}
    write_json(METRICS / "exactness.json", described | found.as_dict())
    require_proved(found, checkpoint)
    write_digests(checkpoint, artifacts.digest_list)
    return f"{found.total.compared} values of {found.source_tensors} tensors compared, {found.total.different} different"


if __name__ == "__main__":
    main()

"""prove: compare every weight with the source's, through bitsandbytes, and record the digest of every file."""

from dataclasses import asdict

from common import METRICS, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.check.proof import compare, require_exact
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.digests import write_digests
from gptoss_nf4.storage.writing import write_json


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    result = compare(open_source(model, artifacts), Checkpoint(artifacts.checkpoint), options, cfg.dtype)
    settings = {"model": model.name, "mode": options.mode, "dtype": cfg.dtype}
    write_json(METRICS / "exactness.json", settings | asdict(result))
    require_exact(result, options, artifacts)
    write_digests(artifacts.checkpoint, artifacts.digest_list)
    return f"{result.compared} weights compared, {result.different} different"


if __name__ == "__main__":
    main()

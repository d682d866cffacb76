"""prove: compare every weight with the source's, through bitsandbytes, and record the digest of every file."""

from dataclasses import asdict

from common import METRICS, model_of, stage
from merging import merge_of
from omegaconf import DictConfig

from gptoss_nf4.check.merge import compare_merged, require_merged
from gptoss_nf4.check.proof import compare, require_exact
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.digests import write_digests
from gptoss_nf4.storage.writing import write_json


def what_is_left(figures: dict) -> str:
    """What became of one kind of module in a merge, for the user."""
    error = f"{figures['kind']}: quantizing again adds an error of {figures['relative_rms_error'] or 0:.2%}"
    if not figures["relative_delta"]:
        return error
    delta = f"the adapter is {figures['relative_delta']:.2%} of the weights, and {figures['delta_kept']:.0%} of it is left"
    return f"{error}; {delta}"


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    source, checkpoint = open_source(model, artifacts), Checkpoint(artifacts.checkpoint)
    merge = merge_of(cfg, source, artifacts)
    settings = {"model": model.name, "mode": options.mode, "dtype": cfg.dtype}
    if merge is None:
        result = compare(source, checkpoint, options, cfg.dtype)
        write_json(METRICS / "exactness.json", settings | asdict(result))
    else:
        result, lost = compare_merged(source, checkpoint, merge, options, cfg.dtype)
        write_json(METRICS / "exactness.json", settings | asdict(result) | {"merge": {"adapter": options.merge} | lost})
        for each in lost["kinds"]:
            print("prove: " + what_is_left(each))
        require_merged(lost, artifacts)
    require_exact(result, options, artifacts)
    write_digests(artifacts.checkpoint, artifacts.digest_list)
    return f"{result.compared} weights compared, {result.different} different"


if __name__ == "__main__":
    main()

"""prove: compare every tensor with the source's, codes through bitsandbytes, and record the digest of every file."""

from dataclasses import replace

from common import METRICS, model_of, stage
from merging import merge_of
from omegaconf import DictConfig

from gptoss_nf4.check.merge import changed_weights, losses, require_merged
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.proof.config import Asked
from gptoss_nf4.proof.prove import prove, require_proved
from gptoss_nf4.source.model import open_source, source_directory
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
    directory, checkpoint = source_directory(model, artifacts), artifacts.require(artifacts.checkpoint, "assemble")
    options, source = RequantOptions.of(cfg.requant), open_source(model, artifacts)
    settings = {key: cfg.requant[key] for key in ("mode", "w13_order", "quant_type", "blocksize")}
    asked = Asked(dtype=cfg.dtype, residual_scale=cfg.residual_scale, **settings)
    if merge := merge_of(cfg, source, artifacts):
        recorded, changed = merge.recorded(cfg.requant.merge), changed_weights(source, merge, options)
        asked = replace(asked, merged_adapter=recorded, changed=changed)
    artifacts.digest_list.unlink(missing_ok=True)  # a proof that fails leaves none of an earlier one
    found = prove(directory, checkpoint, asked)
    described = {"model": model.name, "mode": asked.mode, "dtype": asked.dtype} | found.as_dict()
    if merge:
        lost = losses(source, Checkpoint(checkpoint), merge, options, cfg.dtype)
        described |= {"merge": {"adapter": options.merge} | lost}
        for each in lost["kinds"]:
            print("prove: " + what_is_left(each))
    write_json(METRICS / "exactness.json", described)
    require_proved(found, checkpoint)
    if merge:
        require_merged(lost, checkpoint)
    write_digests(checkpoint, artifacts.digest_list)
    return f"{found.total.compared} values of {found.source_tensors} tensors compared, {found.total.different} different"


if __name__ == "__main__":
    main()

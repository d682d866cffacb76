"""assemble: make the layers' tensors one checkpoint, audit it and prove it exact."""

from common import METRICS, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.assemble import assemble
from gptoss_nf4.checkpoint import Checkpoint
from gptoss_nf4.dtypes import audit, check_dtype
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch import open_source
from gptoss_nf4.files import write_json
from gptoss_nf4.plan import EXACT, RequantOptions
from gptoss_nf4.proof import compare


@stage
def main(cfg: DictConfig) -> None:
    model, artifacts = model_of(cfg)
    options, source = RequantOptions.of(cfg.requant), open_source(model, artifacts)
    assemble(source, artifacts, options, check_dtype(cfg.dtype))
    result = Checkpoint(artifacts.checkpoint)
    floating = audit(result, cfg.dtype)
    proof = compare(source, result, options, cfg.dtype)
    write_json(
        METRICS / "exactness.json",
        {"model": model.name, "mode": options.mode, "dtype": cfg.dtype, **proof, "floating_tensors": floating},
    )
    if options.mode == EXACT and proof["different"]:
        raise UserError(
            "the result is not exact", where=artifacts.checkpoint, got=f"{proof['different']} different weights",
            expected="0", next_step="run `dvc repro -f assemble`; if it stays, report it",
        )  # fmt: skip
    print(f"assemble: {artifacts.checkpoint}, {proof['compared']} weights compared, {proof['different']} different")


if __name__ == "__main__":
    main()

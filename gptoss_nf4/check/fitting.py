"""The check that a converted checkpoint's files hold what its config.json says."""

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.residual import scale_of
from gptoss_nf4.format.result import expected_tensors
from gptoss_nf4.storage.checkpoint import Checkpoint

NEXT_STEP = "run `dvc repro assemble` where it was converted, and copy all of it if it is served elsewhere"


def require_fitting(checkpoint: Checkpoint) -> None:
    """Check that a converted checkpoint holds the tensors that its config.json asks for. UserError names one fault."""
    config_file = checkpoint.directory / "config.json"
    expected = expected_tensors(checkpoint.config, config_file)
    scale_of(checkpoint.config["quantization_config"], config_file)
    missing = sorted(expected.keys() - (checkpoint.tensors.keys() & checkpoint.weight_map.keys()))
    if missing:
        raise UserError(
            "missing tensor",
            where=checkpoint.directory,
            got=f"no {missing[0]} ({len(missing)} in all)",
            expected="every tensor of the model, in the index and in its file",
            next_step=NEXT_STEP,
        )
    for name, (dtypes, shape) in expected.items():
        info = checkpoint.tensors[name]
        if info.dtype not in dtypes or shape not in (None, info.shape):
            raise UserError(
                "wrong tensor",
                where=info.file,
                got=f"{name} {info.dtype} {list(info.shape)}",
                expected=f"{' or '.join(sorted(dtypes))}{'' if shape is None else f' {list(shape)}'}, by config.json",
                next_step=NEXT_STEP,
            )

"""What a converted checkpoint holds, told from its config.json alone; and the check that its files hold that."""

from pathlib import Path

from gptoss_nf4.check.audit import SAFETENSORS_NAMES
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.residual import scale_of
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.tensor_reader import FLOATING

Expected = tuple[frozenset[str], tuple[int, ...] | None]  # dtypes that may be, and the shape; None is any


def expected_tensors(config: dict, where: Path) -> dict[str, Expected]:
    """Every tensor of a converted checkpoint with this config.json: safetensors dtypes and shape by name."""
    d, quantization = Dimensions.from_config(config, where), config["quantization_config"]
    dense_modules, blocksize = set(quantization["modules_to_not_convert"]), quantization["blocksize"]
    state = f"{names.STATE_PREFIX}{quantization['quant_type']}"
    floating = frozenset({SAFETENSORS_NAMES[config["dtype"]]}) if config.get("dtype") in SAFETENSORS_NAMES else FLOATING
    expected: dict[str, Expected] = {name: (floating, shape) for name, shape in names.outside_shapes(d).items()}
    for layer in range(d.layers):
        for old, shape in names.renamed_shapes(d).items():
            expected[names.prefix(layer) + names.RENAMED[old]] = (floating, shape)
        shapes: dict[names.Fusion, list[tuple[int, int]]] = {}
        for fusion, _, shape in names.source_modules(d, layer):
            shapes.setdefault(fusion, []).append(shape)
        for fusion in names.FUSIONS:
            target, (*rows, columns) = names.target_of(fusion, layer), names.fused_shape(fusion, shapes[fusion])
            weight = f"{target}.weight"
            expected[f"{target}.bias"] = (floating, tuple(rows))
            if target in dense_modules:
                expected[weight] = (floating, (*rows, columns))
                continue
            expected[weight] = (frozenset({"U8"}), (*rows, columns // 2))
            expected[f"{weight}.absmax"] = (frozenset({"F32"}), (*rows, columns // blocksize))
            expected[f"{weight}.quant_map"] = (frozenset({"F32"}), (16,))
            expected[f"{weight}.{state}"] = (frozenset({"U8"}), None)
    return expected


def require_fitting(checkpoint: Checkpoint) -> None:
    """Check that a converted checkpoint holds the tensors that its config.json asks for; UserError names one."""
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
            next_step="run `dvc repro assemble` again",
        )
    for name, (dtypes, shape) in expected.items():
        info = checkpoint.tensors[name]
        if info.dtype not in dtypes or shape not in (None, info.shape):
            raise UserError(
                "wrong tensor",
                where=info.file,
                got=f"{name} {info.dtype} {list(info.shape)}",
                expected=f"{' or '.join(sorted(dtypes))} {list(shape or ())} by config.json",
                next_step="run `dvc repro assemble` again",
            )

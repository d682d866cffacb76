"""Which tensors a converted checkpoint holds. Its config.json alone decides that."""

from collections.abc import Mapping
from pathlib import Path

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import FLOATING, SAFETENSORS_NAMES

QUANT_METHOD = "gptoss_nf4"  # in config.json's quantization_config; vLLM selects the plugin by it
FORMAT_VERSION = 1
MERGED_ADAPTER = "merged_adapter"  # in quantization_config, where an adapter is merged: its name and SHA-256
Expected = tuple[frozenset[str], tuple[int, ...] | None]  # (allowed safetensors dtypes, shape); a shape of None allows any


def dense_modules(quantization: Mapping, where: object) -> frozenset[str]:
    """Full names of the fused modules that are not 4-bit, such as "model.layers.0.self_attn.o_proj".

    `quantization` is a converted checkpoint's quantization_config. Where it lists none, all are 4-bit. UserError, which
    names `where`, for anything else than a list of names.
    """
    listed = quantization.get("modules_to_not_convert") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UserError(
            "bad quantization_config",
            where=where,
            got=f"modules_to_not_convert={str(listed)[:80]}",
            expected="a list of names",
            next_step="convert the checkpoint again",
        )
    return frozenset(listed)


def expected_tensors(config: dict, where: Path) -> dict[str, Expected]:
    """Every tensor that a converted checkpoint with this config.json must hold, by its full name.

    UserError, which names `where`, for dimensions that cannot be.
    """
    d, quantization = Dimensions.from_config(config, where), config["quantization_config"]
    dense, blocksize = dense_modules(quantization, where), quantization["blocksize"]
    state = f"{names.STATE_PREFIX}{quantization['quant_type']}"
    floating = frozenset({SAFETENSORS_NAMES[config["dtype"]]}) if config.get("dtype") in SAFETENSORS_NAMES else FLOATING
    expected: dict[str, Expected] = {name: (floating, shape) for name, shape in names.outside_shapes(d).items()}
    for layer in range(d.layers):
        for name, shape in names.kept_shapes(d).items():
            expected[names.prefix(layer) + name] = (floating, shape)
        shapes: dict[names.Fusion, list[tuple[int, int]]] = {}
        for fusion, _, shape in names.modules_of(d, layer):
            shapes.setdefault(fusion, []).append(shape)
        for fusion in names.FUSIONS:
            target, (*rows, columns) = names.target_of(fusion, layer), names.fused_shape(fusion, shapes[fusion])
            weight = f"{target}.weight"
            expected[f"{target}.bias"] = (floating, tuple(rows))
            if target in dense:
                expected[weight] = (floating, (*rows, columns))
                continue
            expected[weight] = (frozenset({"U8"}), (*rows, columns // 2))
            expected[f"{weight}.absmax"] = (frozenset({"F32"}), (*rows, columns // blocksize))
            expected[f"{weight}.quant_map"] = (frozenset({"F32"}), (16,))
            expected[f"{weight}.{state}"] = (frozenset({"U8"}), None)
    return expected

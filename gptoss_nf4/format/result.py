"""Which tensors a converted checkpoint holds. Its config.json alone decides that."""

import re
from collections.abc import Mapping
from pathlib import Path

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.blocks import DIRECTIONS, INPUTS, OUTPUTS, absmax_shape
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import FLOATING, SAFETENSORS_NAMES
from gptoss_nf4.format.rows import INTERLEAVED

QUANT_METHOD = "gptoss_nf4"  # in config.json's quantization_config; vLLM selects the plugin by it
FORMAT_VERSIONS = (1, 2)  # that are read; version 2 may have BLOCKS_ALONG, and is written where it has
BLOCKS_ALONG = "blocks_along"  # in quantization_config: the direction of blocks, by full names of fused experts
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


_EXPERTS = re.compile(r"model\.layers\.\d+\.(mlp\.experts\.(?:w13|w2))")


def format_version(blocks_along: Mapping[str, str]) -> int:
    """The oldest version that says where blocks run. Version 1 says nothing of it: they run along the inputs."""
    return 2 if OUTPUTS in blocks_along.values() else 1


def directions(quantization: Mapping, where: object) -> dict[str, str]:
    """The direction of blocks of fused experts by full name, such as "model.layers.0.mlp.experts.w13".

    `quantization` is a converted checkpoint's quantization_config. What is not listed has INPUTS. UserError, which names
    `where`, for anything else than an object of known names and directions; for OUTPUTS in a version without them; and for
    w13 with OUTPUTS in another order than interleaved, in which a block of 64 outputs would not be together.
    """
    listed = quantization.get(BLOCKS_ALONG)
    if listed is None:
        return {}
    if not isinstance(listed, dict):
        raise _bad_directions(where, listed, "an object")
    for name, direction in listed.items():
        found = _EXPERTS.fullmatch(name) if isinstance(name, str) else None
        if found is None or direction not in DIRECTIONS:
            raise _bad_directions(where, {name: direction}, f"names of fused experts, each with one of {DIRECTIONS}")
        if direction == OUTPUTS and found[1] == names.W13.target and quantization.get("w13_order") != INTERLEAVED:
            got = f"{OUTPUTS} for {name} and w13_order={quantization.get('w13_order')}"
            raise _bad_directions(where, got, f"w13_order={INTERLEAVED}")
    if OUTPUTS in listed.values() and quantization.get("format_version") == 1:
        raise _bad_directions(where, f"{OUTPUTS} and format_version=1", "format_version=2, which has it")
    return dict(listed)


def _bad_directions(where: object, got: object, expected: str) -> UserError:
    return UserError(
        "bad quantization_config",
        where=where,
        got=f"{BLOCKS_ALONG}={str(got)[:120]}",
        expected=expected,
        next_step="convert the checkpoint again",
    )


def expected_tensors(config: dict, where: Path) -> dict[str, Expected]:
    """Every tensor that a converted checkpoint with this config.json must hold, by its full name.

    UserError, which names `where`, for dimensions that cannot be, and for a direction of blocks that is none.
    """
    d, quantization = Dimensions.from_config(config, where), config["quantization_config"]
    dense, blocksize = dense_modules(quantization, where), quantization["blocksize"]
    along = directions(quantization, where)
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
            target, shape_of = names.target_of(fusion, layer), names.fused_shape(fusion, shapes[fusion])
            *rows, columns = shape_of
            direction = along.pop(target, INPUTS)
            weight = f"{target}.weight"
            expected[f"{target}.bias"] = (floating, tuple(rows))
            if target in dense:
                expected[weight] = (floating, (*rows, columns))
                continue
            expected[weight] = (frozenset({"U8"}), (*rows, columns // 2))
            expected[f"{weight}.absmax"] = (frozenset({"F32"}), absmax_shape(shape_of, blocksize, direction))
            expected[f"{weight}.quant_map"] = (frozenset({"F32"}), (16,))
            expected[f"{weight}.{state}"] = (frozenset({"U8"}), None)
    if along:
        raise _bad_directions(where, dict(along), f"experts of {d.layers} layers")
    return expected

"""Stage assemble: the files that make one checkpoint of the layers' tensors. No tensor is written.

The files are the index, config.json, the generation config, and the tokenizer with its chat templates.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_nf4.convert.plan import QuantizedTarget, RequantOptions, plan_layer
from gptoss_nf4.format import residual
from gptoss_nf4.format.blocks import INPUTS
from gptoss_nf4.format.dtypes import check_dtype
from gptoss_nf4.format.result import BLOCKS_ALONG, MERGED_ADAPTER, QUANT_METHOD, format_version
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.side_files import GENERATION_CONFIG, generation_config, template_files, tokenizer_files
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.tensor_reader import read_header
from gptoss_nf4.storage.writing import write_bytes, write_json

if TYPE_CHECKING:
    from gptoss_nf4.convert.merge import Merge


def assemble(
    source: Source,
    artifacts: Artifacts,
    options: RequantOptions,
    dtype: str,
    residual_scale: object = residual.AUTO,
    merge: "Merge | None" = None,
) -> None:
    """Write the files. Always the same ones, since dvc.yaml names them. UserError where an input is missing or bad."""
    check_dtype(dtype)
    directory, origin = artifacts.checkpoint, source.checkpoint.directory
    write_json(directory / INDEX_FILE, build_index(weight_files(source, artifacts)))
    config = build_config(source, options, dtype, residual.resolve(residual_scale, dtype), merge)
    write_json(directory / "config.json", config)
    for name, content in tokenizer_files(origin).items():
        if isinstance(content, bytes):
            write_bytes(directory / name, content)
        else:
            write_json(directory / name, content)
    write_json(directory / GENERATION_CONFIG, generation_config(origin))
    for left_over in template_files(directory):  # of an older version: transformers would prefer them
        left_over.unlink()


def weight_files(source: Source, artifacts: Artifacts) -> list[Path]:
    """The safetensors files of the result. UserError names the stage to run where one is missing."""
    files = [
        artifacts.require(artifacts.layer_weights(layer), f"requant@{layer}") for layer in range(source.dimensions.layers)
    ]
    return [*files, artifacts.require(artifacts.dense_weights, "normalize")]


def build_index(files: list[Path]) -> dict:
    """The index of `files`: file name by tensor name, and the size of all tensors in bytes."""
    weight_map, total = {}, 0
    for file in files:
        for name, info in read_header(file).items():
            weight_map[name] = file.name
            total += info.bytes
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def build_config(
    source: Source, options: RequantOptions, dtype: str, residual_scale: float, merge: "Merge | None" = None
) -> dict:
    """The source's settings with our dtype, and the quantization_config by which vLLM selects the plugin."""
    targets = [t for layer in range(source.dimensions.layers) for t in plan_layer(source, layer, options)]
    four_bit = [target for target in targets if isinstance(target, QuantizedTarget)]
    directions = {target.name: target.blocks_along for target in four_bit if target.blocks_along != INPUTS}
    return source.config | {
        "dtype": dtype,
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "format_version": format_version(directions),
            "quant_type": four_bit[0].quant_type,
            "blocksize": four_bit[0].blocksize,
            "w13_order": options.w13_order,
            "requant_mode": options.mode,
            residual.KEY: residual_scale,
            "modules_to_not_convert": [target.name for target in targets if not isinstance(target, QuantizedTarget)],
        }
        | ({BLOCKS_ALONG: directions} if directions else {})
        | ({MERGED_ADAPTER: merge.recorded(str(options.merge))} if merge else {}),
    }

"""Stage assemble: the files that make one checkpoint of the layers' tensors. No tensor is written.

The files are the index, config.json, the generation config, the tokenizer and its chat template.
"""

from pathlib import Path

from gptoss_nf4.convert.plan import QuantizedTarget, RequantOptions, plan_layer
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import residual
from gptoss_nf4.format.dtypes import check_dtype
from gptoss_nf4.format.result import FORMAT_VERSION, QUANT_METHOD
from gptoss_nf4.source.interface import Source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.reading import read_bytes, read_json_object, read_text
from gptoss_nf4.storage.tensor_reader import read_header
from gptoss_nf4.storage.writing import write_bytes, write_json, write_text

# Keys of tokenizer_config.json that are not taken over: the result runs no code of the source's.
DROPPED = ("torch_dtype", "dtype", "auto_map", "custom_pipelines")
NO_TEMPLATE = "{{ raise_exception('this fine-tune was saved without a chat template') }}\n"


def assemble(
    source: Source, artifacts: Artifacts, options: RequantOptions, dtype: str, residual_scale: object = residual.AUTO
) -> None:
    """Write the files. Always the same ones, since dvc.yaml names them. UserError where an input is missing or bad."""
    check_dtype(dtype)
    directory, origin = artifacts.checkpoint, source.checkpoint.directory
    write_json(directory / INDEX_FILE, build_index(weight_files(source, artifacts)))
    write_json(directory / "config.json", build_config(source, options, dtype, residual.resolve(residual_scale, dtype)))
    write_bytes(directory / "tokenizer.json", read_bytes(_required(origin / "tokenizer.json")))
    tokenizer_config = build_tokenizer_config(origin)
    write_text(directory / "chat_template.jinja", chat_template(origin, tokenizer_config))
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    write_json(directory / "generation_config.json", build_generation_config(source))


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


def build_config(source: Source, options: RequantOptions, dtype: str, residual_scale: float) -> dict:
    """The source's settings with our dtype, and the quantization_config by which vLLM selects the plugin."""
    targets = [t for layer in range(source.dimensions.layers) for t in plan_layer(source, layer, options)]
    quantized = next(target for target in targets if isinstance(target, QuantizedTarget))
    return source.config | {
        "dtype": dtype,
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "quant_type": quantized.quant_type,
            "blocksize": quantized.blocksize,
            "w13_order": options.w13_order,
            "requant_mode": options.mode,
            residual.KEY: residual_scale,
            "modules_to_not_convert": [target.name for target in targets if not isinstance(target, QuantizedTarget)],
        },
    }


def build_tokenizer_config(origin: Path) -> dict:
    """tokenizer_config.json. Older saves keep special tokens in special_tokens_map.json: those are taken over too."""
    config = read_json_object(_required(origin / "tokenizer_config.json"))
    older = origin / "special_tokens_map.json"
    whole = (read_json_object(older) if older.exists() else {}) | config
    return {key: value for key, value in whole.items() if key not in DROPPED}


def chat_template(origin: Path, tokenizer_config: dict) -> str:
    """The chat template, from its own file or else from `tokenizer_config`, where it is removed in any case."""
    inside = tokenizer_config.pop("chat_template", None)
    file = origin / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    return inside if isinstance(inside, str) else NO_TEMPLATE


def build_generation_config(source: Source) -> dict:
    """generation_config.json. Where the source has none, the special token ids of its config.json."""
    path = source.checkpoint.directory / "generation_config.json"
    if path.exists():
        return read_json_object(path)
    config = source.checkpoint.config
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}


def _required(path: Path) -> Path:
    if not path.exists():
        raise UserError(
            "missing file",
            where=path.parent,
            got=f"no {path.name}",
            expected="the tokenizer beside the weights",
            next_step="save it with tokenizer.save_pretrained",
        )
    return path

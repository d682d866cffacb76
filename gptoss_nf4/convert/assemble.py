"""Stage assemble: the files that make the layers' tensors one checkpoint. No tensor is written.

They are the index, config.json, the generation config, the tokenizer and its chat template.
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

# The dtype is ours to say, and code that a source brings along has no place beside the result.
DROPPED = ("torch_dtype", "dtype", "auto_map", "custom_pipelines")
NO_TEMPLATE = "{{ raise_exception('this fine-tune was saved without a chat template') }}\n"


def assemble(
    source: Source, artifacts: Artifacts, options: RequantOptions, dtype: str, residual_scale: object = residual.AUTO
) -> None:
    """Write the checkpoint's own files. Which ones is fixed, since dvc.yaml has to name them."""
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
    files = [
        artifacts.require(artifacts.layer_weights(layer), f"requant@{layer}") for layer in range(source.dimensions.layers)
    ]
    return [*files, artifacts.require(artifacts.dense_weights, "normalize")]


def build_index(files: list[Path]) -> dict:
    weight_map, total = {}, 0
    for file in files:
        for name, info in read_header(file).items():
            weight_map[name] = file.name
            total += info.bytes
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def build_config(source: Source, options: RequantOptions, dtype: str, residual_scale: float) -> dict:
    """The source's config.json with the dtype and the quantization_config by which vLLM selects the plugin."""
    targets = [t for layer in range(source.dimensions.layers) for t in plan_layer(source, layer, options)]
    quantized = next(target for target in targets if isinstance(target, QuantizedTarget))
    config = {key: value for key, value in source.checkpoint.config.items() if key not in DROPPED}
    return config | {
        "architectures": ["GptOssForCausalLM"],
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
    """tokenizer_config.json; older saves keep special tokens in special_tokens_map.json, which is folded in."""
    config = read_json_object(_required(origin / "tokenizer_config.json"))
    older = origin / "special_tokens_map.json"
    whole = (read_json_object(older) if older.exists() else {}) | config
    return {key: value for key, value in whole.items() if key not in DROPPED}


def chat_template(origin: Path, tokenizer_config: dict) -> str:
    """The chat template as a file of its own, wherever the source keeps it (it is taken out of the config)."""
    inside = tokenizer_config.pop("chat_template", None)
    file = origin / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    return inside if isinstance(inside, str) else NO_TEMPLATE


def build_generation_config(source: Source) -> dict:
    """generation_config.json, or its essentials from config.json where the save has none."""
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

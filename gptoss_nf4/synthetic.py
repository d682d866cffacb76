"""A full-size source that needs no download: the published split layout filled with random codes.

For measuring the conversion, not for generating text: every tensor of the real checkpoint is there in its real shape,
several shards, with absmax of plausible size and states as bitsandbytes writes them, but nothing was ever quantized.
Codes depend on the tensor's name alone, so writing twice gives the same bytes.
"""

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gptoss_nf4 import embedded, names
from gptoss_nf4.checkpoint import INDEX_FILE
from gptoss_nf4.codec import NF4_MAP
from gptoss_nf4.dimensions import Dimensions
from gptoss_nf4.files import write_file, write_json

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # of the published checkpoints
ABSMAX_MEAN, ABSMAX_SPREAD = 0.02, 0.015  # so that every de-nested absmax is positive


def write_checkpoint(directory: Path, d: Dimensions) -> None:
    """Write the model: a shard a layer and one for the rest, index, config and the embedded model's tokenizer."""
    from bitsandbytes.functional import create_dynamic_map

    nested_map = create_dynamic_map().numpy()
    weight_map, total = {}, 0

    def write_shard(layer: int) -> tuple[str, dict[str, int]]:
        tensors = layer_tensors(d, layer, nested_map) if layer < d.layers else outside_tensors(d)
        file = f"model-{layer + 1:05d}-of-{d.layers + 1:05d}.safetensors"
        write_file(directory / file, lambda path: write_safetensors(path, tensors))
        return file, {name: array.nbytes for name, (_, array) in tensors.items()}

    # Two at once: random numbers and the disk each take part of a core, and a shard takes half a GB of memory.
    with ThreadPoolExecutor(2) as pool:
        for file, sizes in pool.map(write_shard, range(d.layers + 1)):
            weight_map |= dict.fromkeys(sizes, file)
            total += sum(sizes.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    config = embedded.model_config(d) | {"_name_or_path": "synthetic random codes", "max_position_embeddings": 131072}
    embedded.write_tokenizer(directory)
    write_json(directory / "config.json", config)  # last: its presence says that the checkpoint is whole


Tensors = dict[str, tuple[str, np.ndarray]]  # name -> (safetensors dtype, values; bfloat16 as uint16)


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))


def random_bytes(name: str, count: int) -> np.ndarray:
    """uint8 [count]; whole 64-bit numbers, the fastest that NumPy draws."""
    words = _generator(name).integers(0, 1 << 64, -(-count // 8), dtype=np.uint64)
    return words.view(np.uint8)[:count]


def bfloat16(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> tuple[str, np.ndarray]:
    values = _generator(name).standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
    return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)


def quantized(name: str, shape: tuple[int, int], nested_map: np.ndarray) -> Tensors:
    """A 4-bit weight and its sidecars, as bitsandbytes stores them with double quantization."""
    elements = math.prod(shape)
    blocks = -(-elements // BLOCKSIZE)
    state = {
        "quant_type": "nf4", "blocksize": BLOCKSIZE, "dtype": "bfloat16", "shape": shape,
        "nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": ABSMAX_MEAN,
    }  # fmt: skip
    nested = np.full(-(-blocks // NESTED_BLOCKSIZE), ABSMAX_SPREAD, np.float32)
    return {
        name: ("U8", random_bytes(name, elements // 2).reshape(-1, 1)),
        f"{name}.absmax": ("U8", random_bytes(f"{name}.absmax", blocks)),
        f"{name}.nested_absmax": ("F32", nested),
        f"{name}.quant_map": ("F32", NF4_MAP),
        f"{name}.nested_quant_map": ("F32", nested_map),
        f"{name}.{names.STATE_PREFIX}nf4": ("U8", np.frombuffer(json.dumps(state).encode(), np.uint8)),
    }


def layer_tensors(d: Dimensions, layer: int, nested_map: np.ndarray) -> Tensors:
    tensors: Tensors = {}
    for _, module, shape in names.source_modules(d, layer):
        tensors |= quantized(f"{module}.weight", shape, nested_map)
        tensors[f"{module}.bias"] = bfloat16(f"{module}.bias", shape[:1], 0.02)
    for key, shape in names.renamed_shapes(d).items():
        name, norm = names.prefix(layer) + key, key.endswith("layernorm.weight")
        tensors[name] = bfloat16(name, shape, 0.1 if norm else 0.02, mean=1.0 if norm else 0.0)
    return tensors


def outside_tensors(d: Dimensions) -> Tensors:
    return {
        name: bfloat16(name, shape, 0.1 if "norm" in name else 0.02, mean=1.0 if "norm" in name else 0.0)
        for name, shape in names.outside_shapes(d).items()
    }


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """The format's own layout, for NumPy has no bfloat16: 8 bytes of header length, a JSON header, the values.

    https://github.com/huggingface/safetensors, "Format"; the header is padded to whole 8 bytes.
    """
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).data)

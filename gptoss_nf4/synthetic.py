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
import torch

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
    from safetensors.torch import save_file

    nested_map = create_dynamic_map().numpy()
    weight_map, total = {}, 0

    def write_shard(layer: int) -> tuple[str, dict[str, int]]:
        tensors = layer_tensors(d, layer, nested_map) if layer < d.layers else outside_tensors(d)
        file = f"model-{layer + 1:05d}-of-{d.layers + 1:05d}.safetensors"
        write_file(directory / file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        return file, {name: tensor.nbytes for name, tensor in tensors.items()}

    # Two at once: random numbers and the disk each take part of a core, and a shard takes half a GB of memory.
    with ThreadPoolExecutor(2) as pool:
        for file, sizes in pool.map(write_shard, range(d.layers + 1)):
            weight_map |= dict.fromkeys(sizes, file)
            total += sum(sizes.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    config = embedded.model_config(d) | {"_name_or_path": "synthetic random codes", "max_position_embeddings": 131072}
    embedded.write_tokenizer(directory)
    write_json(directory / "config.json", config)  # last: its presence says that the checkpoint is whole


Tensors = dict[str, torch.Tensor]


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))


def random_bytes(name: str, count: int) -> np.ndarray:
    """uint8 [count]; whole 64-bit numbers, the fastest that NumPy draws."""
    words = _generator(name).integers(0, 1 << 64, -(-count // 8), dtype=np.uint64)
    return words.view(np.uint8)[:count]


def bfloat16(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
    values = _generator(name).standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
    return torch.from_numpy((values.view(np.uint32) >> 16).astype(np.uint16)).view(torch.bfloat16)


def quantized(name: str, shape: tuple[int, int], nested_map: np.ndarray) -> Tensors:
    """A 4-bit weight and its sidecars, as bitsandbytes stores them with double quantization."""
    elements = math.prod(shape)
    blocks = -(-elements // BLOCKSIZE)
    state = {
        "quant_type": "nf4", "blocksize": BLOCKSIZE, "dtype": "bfloat16", "shape": shape,
        "nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": ABSMAX_MEAN,
    }  # fmt: skip
    nested = np.full(-(-blocks // NESTED_BLOCKSIZE), ABSMAX_SPREAD, np.float32)
    arrays = {
        name: random_bytes(name, elements // 2).reshape(-1, 1),
        f"{name}.absmax": random_bytes(f"{name}.absmax", blocks),
        f"{name}.nested_absmax": nested,
        f"{name}.quant_map": NF4_MAP.copy(),  # safetensors writes no memory twice
        f"{name}.nested_quant_map": nested_map.copy(),
        f"{name}.{names.STATE_PREFIX}nf4": np.frombuffer(bytearray(json.dumps(state).encode()), np.uint8),
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


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

"""A full-size source that needs no download: the published split layout, or the fused one, filled with random codes.

It measures the conversion and generates no text. Every tensor of the real checkpoint is there in its real shape, absmax has
a plausible size, and states are as bitsandbytes writes them. But nothing was ever quantized. Codes depend on the tensor's
name alone, so writing twice gives the same bytes.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptoss_nf4.format import names
from gptoss_nf4.format.codec import NF4_MAP
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import ITEM_BYTES
from gptoss_nf4.samples import embedded, fused
from gptoss_nf4.source import split
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.tensor_writer import Declared, writing_tensors
from gptoss_nf4.storage.writing import write_json

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # of the published checkpoints
ABSMAX_MEAN, ABSMAX_SPREAD = (
    0.02,
    0.015,
)  # mean - spread > 0, so every absmax is positive
PIECE_VALUES = 1 << 22


def write_checkpoint(directory: Path, d: Dimensions, stacked: bool = False) -> None:
    """Write the model: a shard for each layer and one for the rest, index, config and the embedded model's tokenizer.

    With `stacked` in the fused layout.
    """
    from gptoss_nf4.eager_bnb import bnb

    nested_map = bnb.create_dynamic_map().numpy()
    weight_map: dict[str, str] = {}
    total = 0

    def write_shard(layer: int) -> tuple[str, dict[str, int]]:
        of_layer = stacked_layer_tensors if stacked else layer_tensors
        tensors = of_layer(d, layer, nested_map) if layer < d.layers else outside_tensors(d)
        file = f"model-{layer + 1:05d}-of-{d.layers + 1:05d}.safetensors"
        # Largest items first, so that every tensor is aligned.
        tensors.sort(key=lambda tensor: -ITEM_BYTES[tensor.declared.dtype])
        with writing_tensors(directory / file, [tensor.declared for tensor in tensors]) as out:
            for tensor in tensors:
                for piece in tensor.pieces():
                    out.append(tensor.declared.name, piece)
        return file, {tensor.declared.name: tensor.declared.bytes for tensor in tensors}

    # Two at once: one draws random numbers while the other waits for the disk.
    with ThreadPoolExecutor(2) as pool:
        for file, sizes in pool.map(write_shard, range(d.layers + 1)):
            weight_map |= dict.fromkeys(sizes, file)
            total += sum(sizes.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    config = embedded.model_config(d) | {"_name_or_path": "synthetic random codes", "max_position_embeddings": 131072}
    config["rope_scaling"] |= {"original_max_position_embeddings": 4096}
    embedded.write_tokenizer(directory)
    write_json(directory / "config.json", config)  # last: its presence says that the checkpoint is whole


@dataclass(frozen=True)
class Made:
    """A tensor to be written, and what makes its bytes, in order and in pieces."""

    declared: Declared
    pieces: Callable[[], Iterator[np.ndarray]]


def _whole(name: str, dtype: str, array: np.ndarray) -> Made:
    return Made(Declared(name, dtype, array.shape), lambda: iter([array]))


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))


def random_bytes(name: str, shape: tuple[int, ...]) -> Made:
    """A uint8 tensor of random bytes. They are drawn as 64-bit numbers, which is NumPy's fastest way."""

    def pieces() -> Iterator[np.ndarray]:
        count = math.prod(shape)
        yield _generator(name).integers(0, 1 << 64, -(-count // 8), dtype=np.uint64).view(np.uint8)[:count]

    return Made(Declared(name, "U8", shape), pieces)


def bfloat16(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Made:
    """A bfloat16 tensor of normal values, made PIECE_VALUES at a time."""

    def pieces() -> Iterator[np.ndarray]:
        generator, count = _generator(name), math.prod(shape)
        for start in range(0, count, PIECE_VALUES):
            values = generator.standard_normal(min(PIECE_VALUES, count - start), dtype=np.float32)
            yield ((values * np.float32(std) + np.float32(mean)).view(np.uint32) >> 16).astype(np.uint16)

    return Made(Declared(name, "BF16", shape), pieces)


def quantized(name: str, shape: tuple[int, ...], nested_map: np.ndarray) -> list[Made]:
    """A 4-bit weight and its sidecars, as bitsandbytes stores them with double quantization."""
    elements = math.prod(shape)
    blocks = -(-elements // BLOCKSIZE)
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCKSIZE,
        "dtype": "bfloat16",
        "shape": shape,
        "nested_blocksize": NESTED_BLOCKSIZE,
        "nested_dtype": "float32",
        "nested_offset": ABSMAX_MEAN,
    }
    nested = np.full(-(-blocks // NESTED_BLOCKSIZE), ABSMAX_SPREAD, np.float32)
    return [
        random_bytes(name, (elements // 2, 1)),
        random_bytes(f"{name}.absmax", (blocks,)),
        _whole(f"{name}.nested_absmax", "F32", nested),
        _whole(f"{name}.quant_map", "F32", NF4_MAP),
        _whole(f"{name}.nested_quant_map", "F32", nested_map),
        _whole(f"{name}.{names.STATE_PREFIX}nf4", "U8", np.frombuffer(json.dumps(state).encode(), np.uint8)),
    ]


def layer_tensors(d: Dimensions, layer: int, nested_map: np.ndarray) -> list[Made]:
    tensors: list[Made] = []
    for _, module, shape in names.modules_of(d, layer):
        tensors += quantized(f"{module}.weight", shape, nested_map)
        tensors.append(bfloat16(f"{module}.bias", shape[:1], 0.02))
    return [*tensors, *_kept_tensors(d, lambda key: names.prefix(layer) + key)]


def _kept_tensors(d: Dimensions, name: Callable[[str], str]) -> Iterator[Made]:
    """Router, sinks and norms; `name` makes the stored name of the published layout's within the layer."""
    for key, kept in split.kept_shapes(d).items():
        norm = key.endswith("layernorm.weight")
        yield bfloat16(name(key), kept, 0.1 if norm else 0.02, mean=1.0 if norm else 0.0)


def stacked_layer_tensors(d: Dimensions, layer: int, nested_map: np.ndarray) -> list[Made]:
    """Those of `layer_tensors` in the fused layout; codes are others, since they are drawn by the tensor's name."""
    tensors: list[Made] = []
    for fusion, module, shape in names.modules_of(d, layer):
        if not fusion.stacked:
            tensors += quantized(f"{module}.weight", shape, nested_map)
            tensors.append(bfloat16(f"{module}.bias", shape[:1], 0.02))
    for stack, _, stacked in fused.stacks(d, layer):
        tensors += quantized(stack, stacked, nested_map)
        tensors.append(bfloat16(f"{stack}_bias", (d.experts, stacked[2]), 0.02))
    return [*tensors, *_kept_tensors(d, lambda key: fused.stored_name(layer, names.prefix(layer) + key))]


def outside_tensors(d: Dimensions) -> list[Made]:
    return [
        bfloat16(name, shape, 0.1 if "norm" in name else 0.02, mean=1.0 if "norm" in name else 0.0)
        for name, shape in names.outside_shapes(d).items()
    ]

"""The arguments with which `vllm serve` serves a converted checkpoint, on the memory that there is. Most need none."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptoss_nf4.format.dimensions import Dimensions

# The values that vLLM allows for max_lora_rank (vllm/config/lora.py).
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
GIB = 1 << 30
UTILIZATION = 0.92  # vLLM's default share of a GPU's memory (vllm/config/cache.py); it ends where that much is not free
SPARE_BYTES = GIB // 4  # for what other programs take between two looks
# What vLLM needs beside weights and KV cache: with 24 GiB, 12.0 of weights left 9.1 for the cache (NOTES.md, Serving).
OTHER_BYTES = 3 * GIB
CACHE_ITEM_BYTES = 2  # the KV cache has 16 bit
CPU_REQUESTS = 4  # of full length that the KV cache in a machine's own memory holds, in float32 half as many
PLAIN_PATH = re.compile(r"[^=,{}]+")  # others are given to --lora-modules as JSON


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter as vLLM serves it: requests call it `name`, its files are in `directory`, `rank` is its largest."""

    name: str
    directory: Path
    rank: int


def lora_rank(adapters: Sequence[ServedAdapter]) -> int:
    """The smallest max_lora_rank that vLLM allows for all of `adapters`."""
    return next(allowed for allowed in MAX_LORA_RANKS if allowed >= max(adapter.rank for adapter in adapters))


@dataclass(frozen=True)
class Memory:
    """Of one GPU or, where there is none, of the machine, in bytes."""

    free: int
    total: int
    gpu: bool


def serve_arguments(
    checkpoint: Path,
    config: dict,
    weight_bytes: int,
    adapters: Sequence[ServedAdapter] = (),
    memory: Memory | None = None,
) -> list[str]:
    """What comes after `vllm serve`. `config` is the checkpoint's config.json, `weight_bytes` the size of its tensors.

    A float32 checkpoint needs its dtype named: vLLM would round it to 16 bit. `memory` is None where it is not known.
    """
    arguments = [str(checkpoint)]
    if config["dtype"] == "float32":
        arguments += ["--dtype", "float32"]
    if memory is not None:
        arguments += _for_memory(checkpoint, config, weight_bytes, memory)
    if adapters:
        modules = [_lora_module(adapter) for adapter in adapters]
        arguments += ["--enable-lora", "--max-lora-rank", str(lora_rank(adapters)), "--lora-modules", *modules]
    return arguments


def _lora_module(adapter: ServedAdapter) -> str:
    directory = str(adapter.directory)
    if PLAIN_PATH.fullmatch(directory):
        return f"{adapter.name}={directory}"
    return json.dumps({"name": adapter.name, "path": directory}, ensure_ascii=False)


def _for_memory(checkpoint: Path, config: dict, weight_bytes: int, memory: Memory) -> list[str]:
    """Arguments without which vLLM would not start: for a GPU that others use too, and for one too small for all tokens."""
    arguments, usable = [], memory.free
    if memory.gpu:
        usable = int(UTILIZATION * memory.total)
        if memory.free < usable:
            share = int(100 * max(memory.free - SPARE_BYTES, 0) / memory.total)
            if share == 0:
                return []  # vLLM says best that nothing is free
            arguments += ["--gpu-memory-utilization", f"{share / 100:.2f}"]
            usable = memory.total * share // 100
    if usable - weight_bytes - OTHER_BYTES < cache_bytes(config, checkpoint / "config.json"):
        arguments += ["--max-model-len", "auto"]  # as many as fit
    return arguments


def cpu_cache_gib(checkpoint: Path, config: dict, weight_bytes: int, free: int) -> int:
    """How many GiB of KV cache to give vLLM where there is no GPU, of `free` bytes; 0 where less than one is left.

    Not told, it fills nearly all memory that is free before it answers.
    """
    wanted = max(GIB, CPU_REQUESTS * cache_bytes(config, checkpoint / "config.json"))
    return max(0, min(wanted, free - weight_bytes - OTHER_BYTES) // GIB)


def cache_bytes(config: dict, where: Path) -> int:
    """The KV cache of one request of full length. Layers with a sliding window keep so little that they do not count."""
    d = Dimensions.from_config(config, where)
    full = config.get("layer_types", ["full_attention"] * d.layers).count("full_attention")
    return config["max_position_embeddings"] * full * 2 * d.kv_heads * d.head_dim * CACHE_ITEM_BYTES

"""Full-size gpt-oss-20b checkpoints of random weights: ours in NF4, in both dtypes, and the stock one in MXFP4.

Ours come in two layouts: with blocks of experts along the inputs, as from a split source, and along the outputs, as from a
fused one. Their weights are the same.

All have the same embeddings, attention biases, norms, sinks, routers and head, and experts of the same size of values,
so a token goes to as many different experts in one as in the other. With a router of standard deviation 0.02 on
embeddings of standard deviation 1, routing spreads over all experts (vLLM's dummy weights send most tokens of a batch
to the same few, so that a batch reads half the bytes).

Ours have the files of a conversion: one for the 4-bit weights of a layer, which the two dtypes share by hard links, and
dense.safetensors for all else.
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from gptoss_nf4.convert.assemble import build_index
from gptoss_nf4.format import names
from gptoss_nf4.format.blocks import INPUTS, OUTPUTS, absmax_shape, state_shape
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.quant_state import QuantState
from gptoss_nf4.format.residual import AUTO, KEY, resolve
from gptoss_nf4.format.result import BLOCKS_ALONG, QUANT_METHOD, format_version
from gptoss_nf4.format.rows import INTERLEAVED
from gptoss_nf4.samples.embedded import model_config
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.writing import write_json

ROOT = Path(__file__).resolve().parent.parent


def configured(name: str) -> Dimensions:
    """The dimensions of conf/model/<name>.yaml."""
    model = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    return Dimensions(layers=len(model.layers), **model.dimensions)


GPT_OSS_20B = configured("synthetic_20b")
BLOCKSIZE = 64
MXFP4_BLOCK = 32
WEIGHT_STD = 0.0115  # of every 4-bit weight: MXFP4 codes are 2.94 on average, times 2^-8
DTYPE = torch.bfloat16  # of the values, whatever dtype stores them
# Kinds of checkpoints. Ours: the dtype of what is not 4-bit.
MXFP4 = "mxfp4"
NF4_DTYPES = {
    "nf4-float16": "float16",
    "nf4-bfloat16": "bfloat16",
    "nf4-fused-float16": "float16",
    "nf4-fused-bfloat16": "bfloat16",
}
KINDS = (*NF4_DTYPES, MXFP4)


def blocks_along(kind: str) -> str:
    """Direction of the experts' blocks in our checkpoint of that kind."""
    return OUTPUTS if kind.startswith("nf4-fused-") else INPUTS


def layers_of(kind: str) -> str:
    """The directory of the files that those of NF4_DTYPES in one layout share."""
    return f"nf4-layers-{blocks_along(kind)}"


def is_experts(name: str) -> bool:
    """Whether a module, by its full name, is fused experts."""
    return ".mlp.experts." in name


@cache
def balanced_bytes(entries: int = 1 << 14) -> torch.Tensor:
    """uint8 [entries]: bytes of two codes, as often as makes the codes' mean value zero and otherwise equally likely."""
    book = CODEBOOKS["nf4"].astype(np.float64)
    low, high = 0.0, 10.0  # tilt: exp(-tilt * value)
    for _ in range(60):
        tilt = (low + high) / 2
        weights = np.exp(-tilt * book)
        low, high = (tilt, high) if (weights * book).sum() > 0 else (low, tilt)
    pairs = np.outer(weights, weights).flatten()
    edges = np.round(np.cumsum(pairs / pairs.sum()) * entries).astype(np.int64)
    return torch.from_numpy(np.repeat(np.arange(256), np.diff(edges, prepend=0)).astype(np.uint8))


class Maker:
    """Random tensors on the GPU where there is one; every tensor has its own seed, so both checkpoints get the same."""

    def __init__(self, d: Dimensions, device: str):
        self.d, self.device = d, device

    def _generator(self, name: str) -> torch.Generator:
        seed = int.from_bytes(name.encode()[-8:], "little") % (1 << 31) + sum(name.encode()) * 7919
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator(name), device=self.device, dtype=torch.float32)
        return (values * std + mean).to(DTYPE).cpu()

    def bytes(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=self._generator(name), device=self.device, dtype=torch.uint8).cpu()

    def codes(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Bytes of two NF4 codes whose values are zero on average.

        Equally likely codes are not (+0.026, since zero takes a negative one's place): every row would share a
        component, hidden states would line up with it, and all tokens would choose the same experts.
        """
        generator = self._generator(name)
        table = balanced_bytes().to(self.device)
        indices = torch.randint(0, len(table), shape, generator=generator, device=self.device, dtype=torch.int32)
        return table[indices].cpu()

    def dense(self, layer: int) -> dict[str, torch.Tensor]:
        """Router, norms and sinks of a layer, under the names that both checkpoints use."""
        tensors = {}
        for key, shape in names.kept_shapes(self.d).items():
            name, norm = names.prefix(layer) + key, key.endswith("layernorm.weight")
            std = 0.1 if norm else 0.02 if key == "mlp.router.weight" else 0.1
            tensors[name] = self.normal(name, shape, std, mean=1.0 if norm else 0.0)
        return tensors

    def outside(self) -> dict[str, torch.Tensor]:
        return {
            name: self.normal(
                name,
                shape,
                0.1 if "norm" in name else 1.0 if "embed" in name else 0.02,
                mean=1.0 if "norm" in name else 0.0,
            )
            for name, shape in names.outside_shapes(self.d).items()
        }

    def nf4(self, name: str, shape: tuple[int, ...], along: str) -> dict[str, torch.Tensor]:
        """A weight [..., rows, in] as `gptoss_nf4.convert.requant` stores it, with blocks in that direction."""
        book = CODEBOOKS["nf4"]
        absmax = WEIGHT_STD / float(np.sqrt(np.mean(np.square(book))))
        state = QuantState(quant_type="nf4", blocksize=BLOCKSIZE, dtype="bfloat16", shape=state_shape(shape, along))
        return {
            name: self.codes(name, (*shape[:-1], shape[-1] // 2)),
            f"{name}.absmax": torch.full(absmax_shape(shape, BLOCKSIZE, along), absmax),
            f"{name}.quant_map": torch.from_numpy(book.copy()),
            f"{name}.{names.STATE_PREFIX}nf4": torch.from_numpy(state.to_json().copy()),
        }

    def nf4_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's 4-bit weights, by the full name of their module."""
        d = self.d
        shapes = {
            "self_attn.qkv_proj": (d.q_rows + 2 * d.kv_rows, d.hidden),
            "self_attn.o_proj": (d.hidden, d.q_rows),
            "mlp.experts.w13": (d.experts, 2 * d.intermediate, d.hidden),
            "mlp.experts.w2": (d.experts, d.hidden, d.intermediate),
        }
        return {names.prefix(layer) + key: shape for key, shape in shapes.items()}

    def nf4_layer(self, layer: int, experts_along: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in self.nf4_shapes(layer).items():
            tensors |= self.nf4(f"{name}.weight", shape, experts_along if is_experts(name) else INPUTS)
        return tensors

    def nf4_dense(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All that is not 4-bit."""
        tensors = self.outside()
        for layer in range(self.d.layers):
            tensors |= self.dense(layer)
            for name, shape in self.nf4_shapes(layer).items():
                tensors[f"{name}.bias"] = self.normal(f"{name}.bias", shape[:-1], 0.02)
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def mxfp4_layer(self, layer: int) -> dict[str, torch.Tensor]:
        d, tensors = self.d, self.dense(layer)
        shapes = {
            "q_proj": (d.q_rows, d.hidden),
            "k_proj": (d.kv_rows, d.hidden),
            "v_proj": (d.kv_rows, d.hidden),
            "o_proj": (d.hidden, d.q_rows),
        }
        for key, shape in shapes.items():
            name = f"{names.prefix(layer)}self_attn.{key}"
            tensors[f"{name}.weight"] = self.normal(f"{name}.weight", shape, WEIGHT_STD)
            tensors[f"{name}.bias"] = self.normal(f"{name}.bias", shape[:1], 0.02)
        for key, rows, columns in (("gate_up_proj", 2 * d.intermediate, d.hidden), ("down_proj", d.hidden, d.intermediate)):
            name = f"{names.prefix(layer)}mlp.experts.{key}"
            blocks = (d.experts, rows, columns // MXFP4_BLOCK)
            tensors[f"{name}_blocks"] = self.bytes(name, (*blocks, MXFP4_BLOCK // 2))
            tensors[f"{name}_scales"] = torch.full(blocks, 127 - 8, dtype=torch.uint8)  # 2^-8
            tensors[f"{name}_bias"] = self.normal(f"{name}_bias", (d.experts, rows), 0.02)
        return tensors


def _config(d: Dimensions, quantization: dict) -> dict:
    rope = {"original_max_position_embeddings": 4096}
    config = model_config(d)
    return config | {
        "rope_scaling": config["rope_scaling"] | rope,
        "initial_context_length": 4096,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "eos_token_id": d.vocabulary - 1,
        "pad_token_id": d.vocabulary - 2,
        "quantization_config": quantization,
    }


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Beside the target, then renamed. Unlike `write_bytes` it does not wait for the disk: these are 30 GB."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(file)


def _finish(directory: Path, config: dict) -> None:
    """Index and config.json for the tensors that are there."""
    write_json(directory / INDEX_FILE, build_index(sorted(directory.glob("*.safetensors"))))
    write_json(directory / "config.json", config)  # last: its presence says that the checkpoint is whole


def write_nf4(directory: Path, d: Dimensions, device: str, kind: str) -> None:
    """Our checkpoint. What is not 4-bit is in its dtype, with the residual_scale that a conversion chooses for it."""
    maker, dtype, along = Maker(d, device), NF4_DTYPES[kind], blocks_along(kind)
    experts = [name for layer in range(d.layers) for name in maker.nf4_shapes(layer) if is_experts(name)]
    directions = dict.fromkeys(experts, along) if along == OUTPUTS else {}
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": format_version(directions),
        "quant_type": "nf4",
        "blocksize": BLOCKSIZE,
        "w13_order": INTERLEAVED,
        "requant_mode": "synthetic",
        KEY: resolve(AUTO, dtype),
        "modules_to_not_convert": [],
    } | ({BLOCKS_ALONG: directions} if directions else {})
    directory.mkdir(parents=True, exist_ok=True)
    for layer in range(d.layers):
        shared, own = (place / f"layer-{layer}.safetensors" for place in (directory.parent / layers_of(kind), directory))
        if not shared.exists():
            _save(shared, maker.nf4_layer(layer, along))
        own.unlink(missing_ok=True)
        os.link(shared, own)
    _save(directory / "dense.safetensors", maker.nf4_dense(getattr(torch, dtype)))
    _finish(directory, _config(d, quantization) | {"dtype": dtype})


def write_mxfp4(directory: Path, d: Dimensions, device: str) -> None:
    maker = Maker(d, device)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    for layer in range(d.layers):
        _save(directory / f"layer-{layer}.safetensors", maker.mxfp4_layer(layer))
    _save(directory / "outside.safetensors", maker.outside())
    _finish(directory, _config(d, {"quant_method": "mxfp4", "modules_to_not_convert": skipped}))


def ensure(directory: Path, kind: str, d: Dimensions, device: str) -> Path:
    """The checkpoint `directory/kind`, one of KINDS of dimensions `d`, made where it is missing."""
    path = directory / kind
    if not (path / "config.json").exists():
        if kind == MXFP4:
            write_mxfp4(path, d, device)
        else:
            write_nf4(path, d, device, kind)
    return path

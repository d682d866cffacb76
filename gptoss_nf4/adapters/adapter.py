"""An adapter in a directory: found, opened, checked and described. A tensor is read only when it is asked for."""

from collections.abc import Iterator
from pathlib import Path

import torch

from gptoss_nf4.adapters.base import BaseMatch, match_base
from gptoss_nf4.adapters.canonical import Delta, delta_of
from gptoss_nf4.adapters.config import AdapterConfig
from gptoss_nf4.adapters.resolve import Module, resolve
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import TORCH_DTYPES
from gptoss_nf4.storage.checkpoint import ADAPTER_CONFIG
from gptoss_nf4.storage.reading import read_json_object, require_plain_files
from gptoss_nf4.storage.tensor_reader import read_header, read_range
from gptoss_nf4.storage.writing import sha256_of

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 4 << 20  # a rank_pattern with every module of gpt-oss-120b takes 0.7 MB


class Adapter:
    """A directory that `save_pretrained` of Unsloth or PEFT wrote, or a trainer's checkpoint.

    >>> adapter = Adapter(Path("outputs/checkpoint-500"))
    >>> for layer, deltas in adapter.layers(dimensions):
    ...     print(layer, sorted(deltas))
    0 ['model.layers.0.mlp.experts.w13', 'model.layers.0.mlp.experts.w2', 'model.layers.0.self_attn.q_proj']
    """

    def __init__(self, directory: Path):
        """Read configuration and tensor header. UserError where one is missing, damaged or not supported."""
        self.directory = directory
        _require_adapter(directory)
        self.config = AdapterConfig.from_dict(read_json_object(directory / ADAPTER_CONFIG), directory / ADAPTER_CONFIG)
        self.weights_file = directory / WEIGHTS_FILE
        self.tensors = read_header(self.weights_file)
        for info in self.tensors.values():
            if not info.floating:
                raise UserError(
                    "wrong tensor",
                    where=self.weights_file,
                    got=f"{info.dtype} {info.name[:200]}",
                    expected="floating-point numbers",
                    next_step="save the adapter again",
                )

    def modules(self, d: Dimensions) -> dict[int, list[Module]]:
        """The modules that the adapter changes, by layer. Names and shapes decide; `resolve` says what is checked."""
        return resolve(self.config, {name: info.shape for name, info in self.tensors.items()}, d, self.weights_file)

    def layers(self, d: Dimensions) -> Iterator[tuple[int, dict[str, Delta]]]:
        """(layer, its deltas by full name), one layer in memory at a time. Layers without deltas are left out."""
        for layer, modules in self.modules(d).items():
            yield layer, {module.name: self.delta(module) for module in modules}

    def layer(self, d: Dimensions, layer: int) -> dict[str, Delta]:
        """One layer's deltas by full name, none where the adapter does not change the layer."""
        return {module.name: self.delta(module) for module in self.modules(d).get(layer, [])}

    def delta(self, module: Module) -> Delta:
        """What the adapter adds to one of its modules. UserError for a value that is not finite."""
        return delta_of(module, self._read, self.weights_file)

    def sha256(self) -> str:
        """Digest of the file of weights, in hex: what tells this adapter from others, wherever it lies."""
        return sha256_of(self.weights_file)

    def validate(self, d: Dimensions) -> None:
        """Check every tensor against the base's dimensions, and every value. UserError for the first fault."""
        for _ in self.layers(d):
            pass

    def describe(self, d: Dimensions) -> dict:
        """What the adapter changes and how much, for a report in JSON. Checks all that `validate` does.

        `frobenius_norm` is that of the module's whole delta, with the scale and over all experts.
        """
        changed = {}
        for modules in self.modules(d).values():
            for module in modules:
                changed[module.name] = _about(module) | {"frobenius_norm": self.delta(module).frobenius_norm()}
        return {
            "base_model": self.config.base_model,
            "peft_version": self.config.peft_version,
            "tensors": len(self.tensors),
            "bytes": sum(info.bytes for info in self.tensors.values()),
            "dtypes": sorted({TORCH_DTYPES[info.dtype] for info in self.tensors.values()}),
            "largest_rank": max(max(about["ranks"]) for about in changed.values()),
            "modules": changed,
        }

    def base_matches(self, base: str, *also: str) -> BaseMatch:
        """Whether the adapter was trained on `base`, a repository or a path. `also` are further names of that base."""
        return match_base(self.config.base_model, base, *also)

    def _read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        data = torch.from_numpy(read_range(info.file, info.start, info.end))
        return data.view(getattr(torch, TORCH_DTYPES[info.dtype])).reshape(info.shape)


def _about(module: Module) -> dict:
    """Shape, ranks and scales of a module, and of experts how many have a delta."""
    about = {
        "shape": list(module.shape),
        "ranks": sorted({factors.rank for factors in module.factors}),
        "scales": sorted({factors.scale for factors in module.factors}),
    }
    if module.experts is not None:
        fused = module.factors[0].expert is None
        about["experts"] = module.experts if fused else len(module.factors)
    return about


def _require_adapter(directory: Path) -> None:
    """UserError where `directory` does not hold one adapter in safe files. It says what is there instead."""

    def refuse(got: str, expected: str, next_step: str) -> UserError:
        return UserError("no adapter", where=directory, got=got, expected=expected, next_step=next_step)

    if not directory.is_dir():
        raise refuse("no such directory", f"a directory with {ADAPTER_CONFIG} and {WEIGHTS_FILE}", "check the path")
    require_plain_files(directory)
    if not (directory / ADAPTER_CONFIG).is_file():
        inside = [path.parent for path in directory.glob(f"*/{ADAPTER_CONFIG}")]
        inside.sort(key=lambda path: (len(path.name), path.name))  # checkpoint-1000 after checkpoint-500
        if inside:
            found = ", ".join(path.name for path in inside[:8])
            raise refuse(f"{len(inside)} adapters in it: {found}", "one adapter", f"give one of them, such as {inside[-1]}")
        if (directory / "config.json").is_file():
            raise refuse("config.json of a whole model", ADAPTER_CONFIG, "convert it with model=local model.path=DIR")
        raise refuse(f"no {ADAPTER_CONFIG}", "what model.save_pretrained(DIR) writes", "check the path")
    size = (directory / ADAPTER_CONFIG).stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise refuse(f"{ADAPTER_CONFIG} of {size} bytes", f"at most {MAX_CONFIG_BYTES}", "do not use this adapter")
    if not (directory / WEIGHTS_FILE).is_file():
        if (directory / PICKLE_FILE).is_file():
            advice = "load it in PEFT and save it with model.save_pretrained(DIR)"
            raise refuse(f"{PICKLE_FILE}, a pickle, which can run code", WEIGHTS_FILE, advice)
        raise refuse(f"no {WEIGHTS_FILE}", f"this file beside {ADAPTER_CONFIG}", "save the adapter again")

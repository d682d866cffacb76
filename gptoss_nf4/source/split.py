"""A checkpoint in the split layout: validated once, here, before any work; read by every layer stage afterwards."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.codec import CODEBOOKS, denest_absmax, dequantize
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.quant_state import MAX_STATE_BYTES, QUANT_TYPES, QuantState
from gptoss_nf4.source import layouts as layout
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.reading import read_json_object, require_plain_files
from gptoss_nf4.storage.tensor_reader import TensorInfo

# Largest distance between neighbours of bitsandbytes' dynamic 8-bit map, of values up to 1.
NESTED_ROUNDING = 0.02
MAX_ABSMAX = 65504.0  # beyond it not even float16 holds the weight


@dataclass(frozen=True)
class Module:
    """One weight of the source: `state` is None where it was left in 16 or 32 bit."""

    name: str
    shape: tuple[int, int]
    state: QuantState | None

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


class SplitSource:
    """The source by modules instead of tensors."""

    def __init__(self, directory: Path):
        if directory.is_dir():
            require_plain_files(directory)
        self.checkpoint = Checkpoint(directory)
        self.layout = layout.require_split(self.checkpoint)
        self.dimensions = Dimensions.from_config(self.checkpoint.config, directory / "config.json")

    @cached_property
    def tensors_by_layer(self) -> dict[int | None, list[str]]:
        """Tensor names of every layer, sorted; under None those outside the layers."""
        found: dict[int | None, list[str]] = {}
        for name in sorted(self.checkpoint.tensors):
            found.setdefault(names.layer_of(name), []).append(name)
        return found

    def modules(self, layer: int, fusion: names.Fusion) -> list[Module]:
        """The modules that `fusion` takes in `layer`, in order."""
        return [
            Module(name, shape, self._state(name))
            for other, name, shape in names.source_modules(self.dimensions, layer)
            if other == fusion
        ]

    def packed(self, module: Module) -> np.ndarray:
        """Codes, uint8 [rows * in_features / 2]."""
        return self.checkpoint.raw(module.weight)

    def absmax(self, module: Module) -> np.ndarray:
        """De-nested absmax, float32 [rows * in_features / blocksize]."""
        nested = module.state.nested

        def sidecar(kind: str) -> np.ndarray:
            return self.checkpoint.numpy(f"{module.weight}.{kind}")

        if nested is None:
            return sidecar("absmax")
        return denest_absmax(
            sidecar("absmax"), sidecar("nested_quant_map"), sidecar("nested_absmax"), nested.blocksize, nested.offset
        )

    def dequantized(self, module: Module) -> np.ndarray:
        """The 4-bit weight in float32 [rows, in_features]."""
        state = module.state
        codebook = CODEBOOKS[state.quant_type]
        return dequantize(self.packed(module), self.absmax(module), codebook, state.blocksize, module.shape)

    def _state_key(self, module: str) -> str | None:
        """Name of the module's quant_state tensor; None where the module is not quantized."""
        keys = [f"{module}.weight.{names.STATE_PREFIX}{kind}" for kind in QUANT_TYPES]
        return next((key for key in keys if key in self.checkpoint.tensors), None)

    def _state(self, module: str) -> QuantState | None:
        key = self._state_key(module)
        if key is None:
            return None
        info = self.checkpoint.tensors[key]
        if info.bytes > MAX_STATE_BYTES:  # before it is read
            raise UserError(
                "bad quantization state",
                where=key,
                got=f"{info.bytes} bytes",
                expected="a few hundred bytes of JSON",
                next_step="fetch the model again",
            )
        return QuantState.from_json(self.checkpoint.raw(key).tobytes(), key)

    def validate(self) -> None:
        """Check every tensor's presence, dtype and shape against config.json; raise a UserError for the first fault."""
        known: set[str] = set()
        for layer in range(self.dimensions.layers):
            for _, name, shape in names.source_modules(self.dimensions, layer):
                known |= self._validate_module(name, shape)
            for name, shape in names.renamed_shapes(self.dimensions).items():
                known.add(self._require_floating(names.prefix(layer) + name, shape))
        for name, shape in names.outside_shapes(self.dimensions).items():
            known.add(self._require_floating(name, shape))
        extra = sorted(set(self.checkpoint.tensors) - known)
        if extra:
            raise UserError(
                "unknown tensor",
                where=self.checkpoint.tensors[extra[0]].file.name,
                got=f"{extra[0]} ({len(extra)} in all)",
                expected="only tensors of the split layout",
                next_step="remove what does not belong to the model, or report the layout",
            )

    def _validate_module(self, name: str, shape: tuple[int, int]) -> set[str]:
        """Check one module and return the names of its tensors."""
        weight, rows = f"{name}.weight", shape[0]
        bias = self._require_floating(f"{name}.bias", (rows,))
        key = self._state_key(name)
        if key is None:
            sidecars = [k for k in (f"{weight}.{kind}" for kind in names.SIDECARS) if k in self.checkpoint.tensors]
            if sidecars:
                raise UserError(
                    "missing tensor",
                    where=name,
                    got=f"{sidecars[0]} without a quantization state",
                    expected=f"{weight}.{names.STATE_PREFIX}nf4",
                    next_step="fetch the model again",
                )
            return {bias, self._require_floating(weight, shape)}
        state = self._state(name)
        if state.shape != shape:
            raise UserError(
                "wrong shape",
                where=key,
                got=list(state.shape),
                expected=f"{list(shape)} from config.json",
                next_step="fetch the model again",
            )
        expected = {weight: ("U8", state.elements // 2), f"{weight}.quant_map": ("F32", 16)}
        if state.nested is None:
            expected[f"{weight}.absmax"] = ("F32", state.blocks)
        else:
            expected[f"{weight}.absmax"] = ("U8", state.blocks)
            expected[f"{weight}.nested_quant_map"] = ("F32", 256)
            expected[f"{weight}.nested_absmax"] = ("F32", -(-state.blocks // state.nested.blocksize))
        for tensor, (dtype, elements) in expected.items():
            info = self._require(tensor)
            if info.dtype != dtype or int(np.prod(info.shape)) != elements:
                raise UserError(
                    "wrong tensor",
                    where=tensor,
                    got=f"{info.dtype} {list(info.shape)}",
                    expected=f"{dtype} with {elements} elements",
                    next_step="fetch the model again",
                )
        if not np.array_equal(self.checkpoint.numpy(f"{weight}.quant_map"), CODEBOOKS[state.quant_type]):
            raise UserError(
                "foreign codebook",
                where=f"{weight}.quant_map",
                got="other values than bitsandbytes' own",
                expected=f"the {state.quant_type} codebook, which every kernel has built in",
                next_step="fetch the model again",
            )
        self._require_scales(Module(name, shape, state))
        return {bias, key, *expected}

    def _require_scales(self, module: Module) -> None:
        """Numbers that absmax can be made of, and absmax from 0 to MAX_ABSMAX (a little below 0 by rounding)."""

        def require(kind: str, values: np.ndarray, smallest: float, largest: float, rising: bool = False) -> None:
            got = float(values.min()), float(values.max())  # NaN if any is
            if not (smallest <= got[0] and got[1] <= largest) or (rising and (np.diff(values) < 0).any()):
                raise UserError(
                    "bad absmax",
                    where=f"{module.weight}.{kind}",
                    got=f"values from {got[0]:g} to {got[1]:g}",
                    expected=f"{'rising' if rising else 'finite'} ones from {smallest:g} to {largest:g}",
                    next_step="fetch the model again",
                )

        rounding = 0.0
        if module.state.nested:
            require("nested_quant_map", self.checkpoint.numpy(f"{module.weight}.nested_quant_map"), -1, 1, rising=True)
            nested = self.checkpoint.numpy(f"{module.weight}.nested_absmax")
            require("nested_absmax", nested, 0, MAX_ABSMAX)
            rounding = NESTED_ROUNDING * float(nested.max())
        require("absmax", self.absmax(module), -rounding, MAX_ABSMAX)

    def _require(self, name: str) -> TensorInfo:
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise UserError(
                "missing tensor",
                where=self.checkpoint.directory,
                got=f"no {name}",
                expected="one",
                next_step="fetch the model again",
            )
        return info

    def _require_floating(self, name: str, shape: tuple[int, ...]) -> str:
        info = self._require(name)
        if not info.floating or info.shape != shape:
            raise UserError(
                "wrong tensor",
                where=name,
                got=f"{info.dtype} {list(info.shape)}",
                expected=f"a floating dtype {list(shape)}",
                next_step="fetch the model again",
            )
        return name


def layer_count(directory: Path) -> int:
    """Number of layers of the checkpoint in `directory`, from its config.json alone."""
    path = directory / "config.json"
    return Dimensions.from_config(read_json_object(path), path).layers


def safe_model_name(text: str) -> str:
    """`text` as a directory name for the artifacts: letters, digits, dot, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "model"

"""The published layout, called split: each expert's projections are 4-bit weights of their own.

Stored names are the canonical ones of `format/names.py`, except for the router, whose linear module was wrapped in another
when this layout was made. Beside a weight lie bitsandbytes' sidecars: `weight.absmax`, `weight.quant_map`,
`weight.quant_state.bitsandbytes__nf4` and, with double quantization, `weight.nested_absmax` and `weight.nested_quant_map`.
"""

import re

import numpy as np

from gptoss_nf4.errors import COPY_AGAIN, OTHER_CONFIG, UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.codec import CODEBOOKS, denest_absmax
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.quant_state import MAX_STATE_BYTES, QUANT_TYPES, QuantState
from gptoss_nf4.source.interface import Floating, Module, Source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.tensor_reader import TensorInfo

# Canonical name -> stored name, within a layer, where the two differ.
STORED_NAMES = {
    "mlp.router.weight": "mlp.router.linear.weight",
    "mlp.router.bias": "mlp.router.linear.bias",
}
_EXPERTS = re.compile(r"\.mlp\.experts\.gate_up_projs\.\d+\.weight$")
_ADAPTER = ".lora_"
# Largest distance between neighbours of bitsandbytes' dynamic 8-bit map, whose values go up to 1. Rounding to that map may
# bring an absmax this much of its nested absmax below 0.
NESTED_ROUNDING = 0.02
MAX_ABSMAX = 65504.0  # float16's largest number: a weight beyond it could not be served in float16


def kept_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shapes of `names.kept_shapes`, by stored name within a layer."""
    return {STORED_NAMES.get(name, name): shape for name, shape in names.kept_shapes(d).items()}


class SplitSource(Source):
    """A checkpoint in the split layout. `Source` documents the methods."""

    layout = "split"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        keys = checkpoint.tensors
        return any(_EXPERTS.search(key) for key in keys) and not any(_ADAPTER in key for key in keys)

    def module(self, name: str, shape: tuple[int, int]) -> Module:
        return Module(name, shape, self._state(name))

    def codes(self, module: Module) -> np.ndarray:
        return self.checkpoint.raw(module.weight)

    def absmax(self, module: Module) -> np.ndarray:
        state = _quantized(module)
        absmax = self.checkpoint.numpy(f"{module.weight}.absmax")
        if state.nested is None:
            return absmax
        return denest_absmax(
            absmax,
            self.checkpoint.numpy(f"{module.weight}.nested_quant_map"),
            self.checkpoint.numpy(f"{module.weight}.nested_absmax"),
            state.nested.blocksize,
            state.nested.offset,
        )

    def floating(self, name: str) -> Floating:
        stored = self._stored_name(name)
        info = self.checkpoint.tensors[stored]
        return Floating(name, stored, info.dtype, info.shape, lambda: self.checkpoint.torch_pieces(stored))

    def stored(self, module: Module) -> dict[str, str]:
        state = _quantized(module)
        kinds = (*names.SIDECARS, *(names.NESTED_SIDECARS if state.nested else ()))
        return {
            "weight": module.weight,
            **{kind: f"{module.weight}.{kind}" for kind in kinds},
            "quant_state": f"{module.weight}.{names.STATE_PREFIX}{state.quant_type}",
        }

    @staticmethod
    def _stored_name(name: str) -> str:
        layer = names.layer_of(name)
        if layer is None:
            return name
        within = name.removeprefix(names.prefix(layer))
        return names.prefix(layer) + STORED_NAMES.get(within, within)

    def _state_key(self, module: str) -> str | None:
        """Stored name of the module's quant_state tensor. None where the module is not quantized."""
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
                next_step=COPY_AGAIN,
            )
        return QuantState.from_json(self.checkpoint.raw(key).tobytes(), key)

    def validate(self) -> None:
        known: set[str] = set()
        for layer in range(self.dimensions.layers):
            for _, name, shape in names.modules_of(self.dimensions, layer):
                known |= self._validate_module(name, shape)
            for stored, kept in kept_shapes(self.dimensions).items():
                known.add(self._require_floating(names.prefix(layer) + stored, kept))
        for stored, outside in names.outside_shapes(self.dimensions).items():
            known.add(self._require_floating(stored, outside))
        extra = sorted(set(self.checkpoint.tensors) - known)
        if extra:
            raise UserError(
                "unknown tensor",
                where=self.checkpoint.tensors[extra[0]].file.name,
                got=f"{extra[0]} ({len(extra)} unknown in all)",
                expected="only tensors of the split layout",
                next_step="remove what does not belong to the model, or report the layout",
            )

    def _validate_module(self, name: str, shape: tuple[int, int]) -> set[str]:
        """Check one module and return the names of its tensors."""
        weight, rows = f"{name}.weight", shape[0]
        bias = self._require_floating(f"{name}.bias", (rows,))
        state = self._state(name)
        if state is None:
            sidecars = [k for k in (f"{weight}.{kind}" for kind in names.SIDECARS) if k in self.checkpoint.tensors]
            if sidecars:
                raise UserError(
                    "missing tensor",
                    where=name,
                    got=f"{sidecars[0]} without a quantization state",
                    expected=f"{weight}.{names.STATE_PREFIX}nf4",
                    next_step=COPY_AGAIN,
                )
            return {bias, self._require_floating(weight, shape)}
        stored = self.stored(Module(name, shape, state))
        if state.shape != shape:
            raise UserError(
                "wrong shape",
                where=stored["quant_state"],
                got=list(state.shape),
                expected=f"{list(shape)} from config.json",
                next_step=OTHER_CONFIG,
            )
        expected = {"weight": ("U8", state.elements // 2), "quant_map": ("F32", 16)}
        if state.nested is None:
            expected["absmax"] = ("F32", state.blocks)
        else:
            expected["absmax"] = ("U8", state.blocks)
            expected["nested_quant_map"] = ("F32", 256)
            expected["nested_absmax"] = ("F32", -(-state.blocks // state.nested.blocksize))
        for kind, (dtype, elements) in expected.items():
            info = self._require(stored[kind])
            if info.dtype != dtype or int(np.prod(info.shape)) != elements:
                raise UserError(
                    "wrong tensor",
                    where=stored[kind],
                    got=f"{info.dtype} {list(info.shape)}",
                    expected=f"{dtype} with {elements} elements",
                    next_step=COPY_AGAIN,
                )
        if not np.array_equal(self.checkpoint.numpy(stored["quant_map"]), CODEBOOKS[state.quant_type]):
            raise UserError(
                "foreign codebook",
                where=stored["quant_map"],
                got="other values than bitsandbytes' own",
                expected=f"the {state.quant_type} codebook, which every kernel has built in",
                next_step="save it with bitsandbytes' own codebook",
            )
        self._require_scales(Module(name, shape, state))
        return {bias, *stored.values()}

    def _require_scales(self, module: Module) -> None:
        """Check that absmax, and what it is computed from, is finite and lies from 0 to MAX_ABSMAX.

        Double quantization rounds, so values of absmax a little below 0 pass.
        """

        def require(kind: str, values: np.ndarray, smallest: float, largest: float, rising: bool = False) -> None:
            got = float(values.min()), float(values.max())  # NaN if any is
            if not (smallest <= got[0] and got[1] <= largest) or (rising and (np.diff(values) < 0).any()):
                raise UserError(
                    "bad absmax",
                    where=f"{module.weight}.{kind}",
                    got=f"values from {got[0]:g} to {got[1]:g}",
                    expected=f"{'rising' if rising else 'finite'} values from {smallest:g} to {largest:g}",
                    next_step=COPY_AGAIN,
                )

        rounding = 0.0
        if _quantized(module).nested:
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
                expected="this tensor in one of the files",
                next_step=COPY_AGAIN,
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
                next_step=OTHER_CONFIG,
            )
        return name


def _quantized(module: Module) -> QuantState:
    """The state of a 4-bit module. ValueError for any other: asking it for codes or absmax is a bug of ours."""
    if module.state is None:
        raise ValueError(f"{module.name} is not 4-bit")
    return module.state

"""The `quantization_config` of a converted checkpoint as plain, checked values. The plugin's classes share them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import INPUTS
from gptoss_nf4.format.quant_state import BLOCKSIZES, QUANT_TYPES
from gptoss_nf4.format.residual import scale_of
from gptoss_nf4.format.result import FORMAT_VERSIONS, dense_modules, directions
from gptoss_nf4.format.rows import W13_ORDERS

WHERE = "config.json"


@dataclass(frozen=True)
class Settings:
    """How the checkpoint's weights are stored, as `gptoss_nf4.convert.assemble` recorded it. `blocksize` is in weights.

    `directions` has the direction of blocks of fused experts by their full names: `blocks_along` asks it.
    """

    quant_type: str
    blocksize: int
    w13_order: str
    residual_scale: float = 1.0
    dense_modules: frozenset[str] = field(default_factory=frozenset)
    directions: Mapping[str, str] = field(default_factory=dict)

    def blocks_along(self, name: str) -> str:
        """The direction of blocks of the module of that full name in the checkpoint (`format/blocks.py`)."""
        return self.directions.get(name, INPUTS)

    @classmethod
    def of(cls, config: Mapping) -> "Settings":
        """Read the section of config.json. UserError names the field that this version cannot serve."""
        allowed: dict[str, tuple] = {
            "format_version": FORMAT_VERSIONS,
            "quant_type": QUANT_TYPES,
            "blocksize": BLOCKSIZES,
            "w13_order": W13_ORDERS,
        }
        for key, values in allowed.items():
            if config.get(key) not in values:
                raise UserError(
                    "bad quantization_config",
                    where=WHERE,
                    got=f"{key}={config.get(key)!r}",
                    expected=f"one of {values}",
                    next_step="convert the checkpoint with this version of gptoss-nf4",
                )
        return cls(
            quant_type=config["quant_type"],
            blocksize=config["blocksize"],
            w13_order=config["w13_order"],
            residual_scale=scale_of(config, WHERE),
            dense_modules=dense_modules(config, WHERE),
            directions=directions(config, WHERE),
        )

"""What config.json of the result must say: the function of the source's, and how the plugin is to read the weights.

Both files are loaded by transformers, and what it made of them is compared. So nothing here knows what a field means.
"""

import copy
import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.proof.compare import CONCATENATED, INTERLEAVED

EXACT = "exact"
# The conversion decides these, and they have their own check below. transformers_version says who wrote the file.
OWN_KEYS = {
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "model_type",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}
ABSENT_KEYS = ("auto_map", "custom_pipelines", "torch_dtype")  # code of the source's, and a second dtype
# No value of the network depends on these. They may be left out, but not changed.
WITHOUT_EFFECT = {"attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef", "use_cache"}
# transformers 4.5x writes the first two, transformers 5 the third; it reads both.
ROPE_KEYS = {"rope_scaling", "rope_theta", "rope_parameters"}
# What transformers' `_compute_yarn_parameters` reads; vLLM's gpt-oss has no other type of rope.
YARN_KEYS = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_type",
    "truncate",
    "type",
}
NOTHING = "nothing"  # stands for a key that is not there
NEXT_STEP = "run `dvc repro -s -f assemble`, then `dvc repro prove`; if it stays, report it"


@dataclass(frozen=True)
class Asked:
    """The settings by which the result was made. `quant_type` and `blocksize` are for mode nf4.

    Where an adapter is merged, config.json has `merged_adapter`, and `changed` says which weights are not the source's any
    more: (name of the result's tensor, number of the source's matrix in it). Their values are left to `check.merge`.
    """

    mode: str
    w13_order: str
    quant_type: str
    blocksize: int
    dtype: str
    residual_scale: object
    merged_adapter: dict | None = None
    changed: Set[tuple[str, int]] = frozenset()

    @property
    def scale(self) -> object:
        """The residual_scale: `auto` is 1/64 for float16, whose largest number is 65,504, and else 1."""
        if self.residual_scale == "auto":
            return 1 / 64 if self.dtype == "float16" else 1
        return self.residual_scale


def require_function(source: dict, result: dict, asked: Asked, where: object) -> None:
    """Check that the model that `result` describes computes what that of `source` does. UserError names the key.

    A field that GptOssConfig declares must have the same value once both are loaded. So a default may be written out or
    left out. Any other key must be the source's or a default of transformers': none is added, none changed.
    """
    from gptoss_nf4.proof.bare_config import GptOssConfig

    before, after = load(_readable(source), where), load(result, where)
    declared = GptOssConfig.__annotations__.keys() - WITHOUT_EFFECT - ROPE_KEYS
    for key in sorted(declared):
        if getattr(before, key) != getattr(after, key):
            raise differs(where, key, getattr(after, key), getattr(before, key))
    defaults = before.to_dict()
    for key in sorted(result.keys() - declared - OWN_KEYS - ROPE_KEYS):
        expected = source.get(key, defaults.get(key, NOTHING))
        if result[key] != expected:
            raise differs(where, key, result[key], expected)
    _require_rope(before, after, result, where)
    own = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "dtype": asked.dtype}
    own |= dict.fromkeys(ABSENT_KEYS, NOTHING)
    for key, value in own.items():
        if result.get(key, NOTHING) != value:
            raise differs(where, key, result.get(key, NOTHING), value)


def _readable(source: dict) -> dict:
    """`source` without what older libraries wrote and transformers 5 does not read: OpenAI's name, 7 for 7.0, null."""
    from gptoss_nf4.proof.bare_config import GptOssConfig

    declared = GptOssConfig.__annotations__.keys()
    found = {"num_experts_per_tok": source["experts_per_token"]} if "experts_per_token" in source else {}
    for key, value in source.items():
        says_nothing = value is None and key not in declared - WITHOUT_EFFECT | ROPE_KEYS
        if not says_nothing and key not in OWN_KEYS:
            found[key] = value
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := found.get(key), dict) and rope.get("partial_rotary_factor", 1) is None:
            found[key] = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    for key in declared & found.keys():
        kind, value = type(getattr(GptOssConfig, key)), found[key]
        if kind in (bool, int, float) and isinstance(value, int | float) and kind(value) == value:
            found[key] = kind(value)
    if found.get("num_key_value_heads", 0) is None:  # these two as GptOssConfig's own __post_init__ has them
        found["num_key_value_heads"] = found.get("num_attention_heads", GptOssConfig.num_attention_heads)
    if found.get("head_dim", 0) is None:
        hidden = found.get("hidden_size", GptOssConfig.hidden_size)
        found["head_dim"] = hidden // found.get("num_attention_heads", GptOssConfig.num_attention_heads)
    return found


def load(config: dict, where: object) -> Any:
    """transformers' GptOssConfig of a config.json. UserError where transformers refuses it."""
    from gptoss_nf4.proof.bare_config import GptOssConfig

    fields = {key: copy.deepcopy(value) for key, value in config.items() if key != "quantization_config"}
    try:
        return GptOssConfig(**fields)
    except Exception as error:  # a stranger's values, a library's checks: whatever they raise
        raise differs(where, "a value", " ".join(str(error).split()), "values that transformers loads") from None


def _require_rope(before: Any, after: Any, result: dict, where: object) -> None:
    """The two GptOssConfigs turn by the same angles, as transformers computes them, and `result` says no more than that."""
    section = result.get("rope_scaling") or result.get("rope_parameters") or {}
    for key in sorted(section.keys() - YARN_KEYS):
        raise differs(where, f"rope {key}", section[key], NOTHING)
    if after.rope_parameters["rope_type"] != "yarn":
        raise differs(where, "rope_type", after.rope_parameters["rope_type"], "yarn")
    (angles, factor), (found, scaled) = _angles(before, where), _angles(after, where)
    if angles != found or not math.isclose(factor, scaled, rel_tol=1e-6):
        raise differs(where, "rope", f"other angles by {after.rope_parameters}", f"those of {before.rope_parameters}")


def _angles(config: Any, where: object) -> tuple[list[float], float]:
    """The inverse frequencies, and the factor of cosine and sine, that transformers computes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise differs(where, "rope", first_line(error), "parameters that transformers computes angles with") from None
    return frequencies.tolist(), factor


def require_quantization(section: object, asked: Asked, dense: list[str], turned: list[str], where: object) -> None:
    """Check `quantization_config`, by which the plugin reads the weights. UserError names the key.

    `dense` are the modules of attention that are not 4-bit, and `turned` the experts whose blocks run along the outputs. In
    mode exact the type and the blocksize are the source's: the comparison of the weights checks them.
    """
    if not isinstance(section, dict):
        raise differs(where, "quantization_config", section, "an object")
    required = {
        "quant_method": "gptoss_nf4",
        "format_version": 2 if turned else 1,  # version 1 knows no such blocks
        "quant_type": asked.quant_type,
        "blocksize": asked.blocksize,
        "w13_order": asked.w13_order,
        "requant_mode": asked.mode,
        "residual_scale": asked.scale,
        "modules_to_not_convert": dense,
    }
    if turned:
        required["blocks_along"] = dict.fromkeys(turned, "outputs")
    if asked.merged_adapter is not None:
        required["merged_adapter"] = asked.merged_adapter
    if asked.mode == EXACT:
        required |= {key: section.get(key, "a value") for key in ("quant_type", "blocksize")}
    for key in [*required, *sorted(section.keys() - required.keys())]:
        if section.get(key, NOTHING) != required.get(key, NOTHING):
            raise differs(where, f"quantization_config.{key}", section.get(key, NOTHING), required.get(key, NOTHING))
    scale = section["residual_scale"]
    if not (2**-14 <= scale <= 1 and math.frexp(scale)[0] == 0.5):
        raise differs(where, "quantization_config.residual_scale", scale, "a power of two from 2^-14 to 1")
    if section["w13_order"] not in (INTERLEAVED, CONCATENATED):
        raise differs(where, "quantization_config.w13_order", section["w13_order"], f"{INTERLEAVED} or {CONCATENATED}")


def differs(where: object, key: str, got: object, expected: object) -> UserError:
    return UserError(
        f"config.json is not the source's in {key}",
        where=where,
        got=str(got)[:200],
        expected=str(expected)[:200],
        next_step=NEXT_STEP,
    )

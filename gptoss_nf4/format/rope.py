"""`rope_parameters` of a gpt-oss config.json: what vLLM reads of it, and what its gpt-oss has built in.

Facts: vLLM 0.32.0 `models/gpt_oss.py` OAIAttention and `rotary_embedding/yarn_scaling_rope.py`; transformers 5.19
`modeling_rope_utils.py` RopeParameters, RotaryEmbeddingConfigMixin and _compute_yarn_parameters.
"""

import math

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.switches import is_off

# vLLM takes these from config.json.
READ = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
# vLLM ignores these: it has yarn on whole heads built in, and computes the attention factor from `factor` alone.
CHECKED = ("rope_type", "type", "attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor")
# Of other types than yarn.
FOREIGN = ("short_factor", "long_factor", "low_freq_factor", "high_freq_factor")

THETA, BETA_FAST, BETA_SLOW = 150000.0, 32.0, 1.0
# What GptOssConfig takes where config.json says nothing about rope.
DEFAULT = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": BETA_FAST,
    "beta_slow": BETA_SLOW,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
MAX_SCALING = 1000  # of cosine and sine: far beyond any yarn
MAX_POSITIONS = 1 << 28  # of the table that vLLM makes: far beyond any gpt-oss


def served_rope(config: dict, positions: int, where: object) -> dict:
    """All fields of `rope_parameters` that vLLM reads, for a model of `positions` max_position_embeddings.

    As in transformers 5, `rope_scaling` comes before `rope_parameters`, and `rope_theta` may stand beside either. Its
    defaults are filled in. UserError, which names `where` and the key, for a rope that vLLM's gpt-oss does not have.
    """
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(place)
    if rope is None and "rope_scaling" in config:  # transformers 4 reads null as no yarn, transformers 5 as its default
        raise _refused(where, "rope_scaling", None, "yarn's parameters")
    rope = DEFAULT if rope is None else rope
    if not isinstance(rope, dict):
        raise _refused(where, place, rope, "an object")
    _require_plain_yarn(rope, place, where)

    def number(key: str, value: object, smallest: float) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not smallest <= value <= MAX_POSITIONS:
            raise _refused(where, f"{place}.{key}", value, f"a number from {smallest:g} to {MAX_POSITIONS}")
        return float(value)

    original = number("original_max_position_embeddings", rope.get("original_max_position_embeddings", positions), 1)
    factor = rope.get("factor", "nothing")
    factor = number("factor", positions / original if factor is None else factor, 1)
    if not original.is_integer() or not positions <= original * factor <= MAX_POSITIONS:
        raise _refused(  # vLLM's table of cosines ends at their product
            where,
            f"{place}.original_max_position_embeddings",
            f"{original:g} with factor={factor:g}",
            f"a whole number that times factor is at least max_position_embeddings={positions}",
        )
    _require_plain_scaling(rope, factor, place, where)
    truncate = rope.get("truncate", True)
    if truncate not in (None, True, False):  # such as the text "false", which is true
        raise _refused(where, f"{place}.truncate", truncate, "true or false")
    return {
        "rope_type": "yarn",
        "rope_theta": number("rope_theta", rope.get("rope_theta", config.get("rope_theta", THETA)), 2),
        "factor": factor,
        "original_max_position_embeddings": int(original),
        "beta_fast": number("beta_fast", rope.get("beta_fast") or BETA_FAST, 1e-6),
        "beta_slow": number("beta_slow", rope.get("beta_slow") or BETA_SLOW, 1e-6),
        "truncate": bool(truncate),
    }


def _require_plain_yarn(rope: dict, place: str, where: object) -> None:
    """UserError for another type than yarn, for a part of each head, and for a parameter that yarn does not have."""
    kinds = {key: rope[key] for key in ("rope_type", "type") if key in rope} or {"rope_type": "default"}
    for key, kind in kinds.items():
        if kind != "yarn":
            raise _refused(where, f"{place}.{key}", kind, "yarn")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise _refused(where, f"{place}.partial_rotary_factor", rope["partial_rotary_factor"], "1")
    for key in sorted(rope.keys() - {*READ, *CHECKED}):
        if not is_off(rope[key]):
            raise _refused(where, f"{place}.{key}", rope[key], f"only {', '.join(READ)}")


def _require_plain_scaling(rope: dict, factor: float, place: str, where: object) -> None:
    """UserError where cosine and sine are scaled by another number than the one that vLLM computes from `factor`."""
    given, mscale, all_dim = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    named = ("attention_factor",) if given is not None else ("mscale", "mscale_all_dim")
    for key in named:
        if rope.get(key) is not None and (type(rope[key]) not in (int, float) or not abs(rope[key]) <= MAX_SCALING):
            raise _refused(where, f"{place}.{key}", rope[key], f"a number of at most {MAX_SCALING}")
    built_in = _mscale(factor, 1)
    scaling = built_in
    if given is not None:
        scaling = given
    elif mscale and all_dim:
        scaling = _mscale(factor, mscale) / (_mscale(factor, all_dim) or math.inf)
    if not math.isclose(scaling, built_in, rel_tol=1e-6):
        got = f" and {place}.".join(f"{key}={rope[key]}" for key in named)
        key, _, value = got.partition("=")
        raise _refused(where, f"{place}.{key}", value, f"no such key: vLLM computes {built_in:.6g} from factor")


def _mscale(factor: float, mscale: float) -> float:
    """yarn's factor of cosine and sine."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _refused(where: object, key: str, value: object, expected: str) -> UserError:
    return UserError(
        "unsupported config",
        where=where,
        got=f"{key}={str(value)[:80]}",
        expected=expected,
        next_step="vLLM has yarn and its constants built into gpt-oss: correct config.json if it is wrong there",
    )

"""adapter_config.json: the scale, the rank and the order of the tensors beside it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from gptoss_nf4.adapters.patterns import Patterns
from gptoss_nf4.adapters.peft_fields import require_plain_lora
from gptoss_nf4.errors import UserError

# Orders of a fused lora_B's columns, [out, E * r], by Unsloth's names for them (unsloth_zoo 2026.10.9 `moe_utils.py`).
RANK_MAJOR = "rank_major"  # column j * E + e is column j of expert e: PEFT's own order
GROUPED_BY_EXPERT = "grouped_by_expert"  # column e * r + j: Unsloth's from 2026-02-05 to 2026.9.5
LAYOUTS = (RANK_MAJOR, GROUPED_BY_EXPERT)

# The largest max_lora_rank of vLLM 0.32.0: a larger rank could not be served. It also bounds memory.
MAX_RANK = 512
MAX_TEXT = 4096  # characters, as many as a path may have
EMBEDDINGS = ("embed_tokens", "lm_head")
# The last part of a name in target_parameters: an experts' weight, or the weight of a linear module or of the router.
WEIGHTS = ("gate_up_proj", "down_proj", "weight")


@dataclass(frozen=True)
class AdapterConfig:
    """A PEFT LoRA configuration that means `weight += scale * B @ A` and nothing else."""

    where: object
    """The file, for errors."""
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str
    """Names or a regular expression. It is not evaluated: the tensors tell what was trained."""
    target_parameters: tuple[str, ...]
    base_model: str | None
    peft_version: str | None
    transformers_version: str | None
    """No library writes it, but a user may. See `swapped_experts`."""
    auto_mapping: Mapping
    layouts: Mapping[str | None, str]
    """Column order of a fused lora_B, by its parameter's name. The key None stands for all others."""

    @classmethod
    def from_dict(cls, config: Mapping, where: object) -> "AdapterConfig":
        """Read a parsed adapter_config.json. UserError for a field of a wrong type and for what cannot be served."""
        require_plain_lora(config, where)
        read = _Fields(config, where)
        result = cls(
            where=where,
            r=read.rank("r", config.get("r")),
            lora_alpha=read.number("lora_alpha", config.get("lora_alpha")),
            use_rslora=read.switch("use_rslora"),
            rank_pattern={key: read.rank("rank_pattern", value) for key, value in read.mapping("rank_pattern").items()},
            alpha_pattern={
                key: read.number("alpha_pattern", value) for key, value in read.mapping("alpha_pattern").items()
            },
            target_modules=read.names_or_expression("target_modules"),
            target_parameters=read.names("target_parameters"),
            base_model=read.text("base_model_name_or_path"),
            peft_version=read.text("peft_version"),
            transformers_version=read.text("transformers_version"),
            auto_mapping=read.mapping("auto_mapping"),
            layouts=_layouts(config, where),
        )
        result._require_served_targets()
        # Bad patterns are refused now, not when the first module asks.
        _ = result._ranks, result._alphas
        return result

    @cached_property
    def _ranks(self) -> Patterns[int]:
        return Patterns(self.rank_pattern, f"{self.where}, rank_pattern")

    @cached_property
    def _alphas(self) -> Patterns[float]:
        return Patterns(self.alpha_pattern, f"{self.where}, alpha_pattern")

    def rank(self, module: str) -> int:
        """The rank of `module`, by PEFT's rules: a module's full name, or a parameter's where that was the target."""
        return self._ranks.get(module, self.r)

    def scale(self, module: str) -> float:
        """The factor of B @ A for `module`, named as for `rank`: alpha / r, or alpha / sqrt(r) in rank-stabilized LoRA."""
        rank = self.rank(module)
        return self._alphas.get(module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets_parameter(self, name: str) -> bool:
        """Whether target_parameters names the parameter `name`, a full name, or an end of it behind a dot, as in PEFT."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def grouped_by_expert(self, parameter: str) -> bool:
        """Whether the fused lora_B of `parameter`, `gate_up_proj` or `down_proj`, has its columns grouped by expert."""
        return self.layouts.get(parameter, self.layouts.get(None, RANK_MAJOR)) == GROUPED_BY_EXPERT

    def swapped_experts(self) -> bool | None:
        """Whether PEFT took the inputs of fused experts for their outputs. None where the versions do not tell.

        gpt-oss stores expert weights as [experts, in, out], and transformers' module says `is_transposed` from 5.0 on.
        PEFT before 0.19.0 never swapped. 0.19.0 swapped where the module says `is_transposed`. 0.19.1 and later swap where
        it does not. No library writes the version of transformers, but a user may add it to adapter_config.json.
        """
        peft = _version(self.peft_version)
        if peft is not None and peft < (0, 19, 0):
            return False
        transformers = _version(self.transformers_version)
        if peft is None or transformers is None:
            return None
        says_transposed = transformers >= (5, 0, 0)
        return says_transposed if peft == (0, 19, 0) else not says_transposed

    def _require_served_targets(self) -> None:
        """Refuse embeddings, head, biases and sinks by name. The keys of the tensors are checked later, too."""
        modules = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        parameters = self.target_parameters
        bad = [("target_modules", name) for name in modules if name.rpartition(".")[2] in EMBEDDINGS]
        bad += [("target_parameters", name) for name in parameters if name.rpartition(".")[2] not in WEIGHTS]
        bad += [("target_parameters", name) for name in parameters if any(part in EMBEDDINGS for part in name.split("."))]
        if bad:
            field, name = bad[0]
            raise UserError(
                f"adapter not supported ({name[:80]})",
                where=self.where,
                got=f"this name in {field}",
                expected="weights of attention, router and experts only",
                next_step="train without it",
            )


def _layouts(config: Mapping, where: object) -> dict[str | None, str]:
    """Column order by parameter, as Unsloth's own `saved_lora_b_layouts` finds it.

    Unsloth run with UNSLOTH_MOE_LORA_MERGED=1 kept PEFT's order and recorded nothing. Unsloth itself then reads such an
    adapter as grouped by expert, and so does this.
    """

    def known(layout: object) -> str:
        if layout not in LAYOUTS:
            raise UserError(
                "unknown order of lora_B",
                where=where,
                got=f"lora_B_layout={str(layout)[:80]}",
                expected=f"one of {LAYOUTS}",
                next_step="load it in the Unsloth it was trained with and save it again",
            )
        return layout

    auto_mapping = config.get("auto_mapping")
    auto_mapping = auto_mapping if isinstance(auto_mapping, dict) else {}
    for source in (config, auto_mapping):
        detail = source.get("unsloth_fused_expert_lora")
        parameters = detail.get("parameters") if isinstance(detail, dict) else None
        if isinstance(parameters, dict):
            entries = {name: entry for name, entry in parameters.items() if isinstance(entry, dict)}
            return {name: known(entry["lora_B_layout"]) for name, entry in entries.items() if "lora_B_layout" in entry}
        if "lora_B_layout" in source:
            return {None: known(source["lora_B_layout"])}
    if config.get("target_parameters") and auto_mapping.get("unsloth_fixed"):
        return {None: GROUPED_BY_EXPERT}
    return {}


def _version(text: str | None) -> tuple[int, ...] | None:
    """(major, minor, patch) of a version like 0.19.1, 0.20 or 0.18.0.dev0@abc."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text or "")
    return tuple(int(part or 0) for part in found.groups()) if found else None


@dataclass(frozen=True)
class _Fields:
    """Typed access to a JSON object that a stranger wrote."""

    config: Mapping
    where: object

    def rank(self, field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
            raise self._bad(field, value, f"a rank from 1 to {MAX_RANK}, the largest that vLLM serves")
        return value

    def number(self, field: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e9:  # NaN too
            raise self._bad(field, value, "a number of at most 1e9")
        return float(value)

    def switch(self, field: str) -> bool:
        value = self.config.get(field)
        if value not in (None, True, False):
            raise self._bad(field, value, "true or false")
        return bool(value)

    def text(self, field: str) -> str | None:
        value = self.config.get(field)
        if value is not None and not (isinstance(value, str) and value.isprintable() and len(value) <= MAX_TEXT):
            raise self._bad(field, value, f"a line of text of at most {MAX_TEXT} characters")
        return value

    def mapping(self, field: str) -> dict:
        value = self.config.get(field)
        if value is not None and not isinstance(value, dict):
            raise self._bad(field, value, "a JSON object")
        return value or {}

    def names(self, field: str) -> tuple[str, ...]:
        value = self.config.get(field)
        if value is not None and not (isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)):
            raise self._bad(field, value, "a list of names")
        return tuple(sorted(value or ()))

    def names_or_expression(self, field: str) -> tuple[str, ...] | str:
        value = self.config.get(field)
        return value if isinstance(value, str) else self.names(field)

    def _bad(self, field: str, value: object, expected: str) -> UserError:
        return UserError(
            "bad adapter_config.json",
            where=self.where,
            got=f"{field}={str(value)[:80]}",
            expected=expected,
            next_step="restore the adapter's own adapter_config.json",
        )

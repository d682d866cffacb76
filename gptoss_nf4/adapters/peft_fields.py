"""Every field of PEFT's LoraConfig, and what it means for serving: read, without effect, or refused.

Checked against PEFT 0.18.0 to 0.21.2; a test fails when PEFT gains a field. A field is without effect if the function of
the trained adapter does not depend on it: it chose what was trained, or how, and the tensors show the outcome.
"""

from collections.abc import Mapping

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.switches import is_off

READ = frozenset(
    {
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "target_parameters",
        "init_lora_weights",
    }
)
# Fields that PEFT does not have: Unsloth's record of the column order, and what `swapped_experts` may need from the user.
READ_BEYOND_PEFT = frozenset({"lora_B_layout", "unsloth_fused_expert_lora", "transformers_version"})

WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "revision",
        "inference_mode",
        "runtime_config",
        "lora_dropout",  # in training only
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",  # of embedding and head, which are refused themselves
        "megatron_core",  # a module's name; megatron_config switches it on
        "qalora_group_size",  # use_qalora switches it on
        "velora_config",  # another backward pass
        # Settings of starting values; which of them took effect is in init_lora_weights.
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)

# Field -> (why the adapter is more than scale * B @ A on the base's weight, what to do instead).
REFUSED = {
    "use_dora": ("DoRA also rescales the whole weight, row by row", "train with use_dora=False"),
    "lora_bias": ("the adapter has biases", "train with lora_bias=False"),
    "bias": ("the base's biases were trained too", "train with bias='none'"),
    "modules_to_save": ("whole modules were trained too", "train with modules_to_save=None"),
    "trainable_token_indices": ("embeddings were trained too", "train without trainable_token_indices"),
    "use_qalora": ("QALoRA pools the inputs", "train with use_qalora=False"),
    "use_bdlora": ("BD-LoRA's matrices are block-diagonal", "train with use_bdlora=None"),
    "kasa_config": ("KaSA changes the base's weight and puts a diagonal between A and B", "train with kasa_config=None"),
    "monteclora_config": ("MonteCLoRA saves a distribution beside A and B", "train with monteclora_config=None"),
    "arrow_config": ("Arrow routes between several adapters", "train with arrow_config=None, one adapter"),
    "alora_invocation_tokens": ("Activated LoRA acts after certain tokens only", "train without alora_invocation_tokens"),
    "layer_replication": ("the model that was trained has more layers than the base", "train without layer_replication"),
    "fan_in_fan_out": ("gpt-oss's linear weights are stored as [out, in]", "train with fan_in_fan_out=False"),
    "megatron_config": ("Megatron's parallel layers store A and B in parts", "train with transformers or Unsloth"),
}

# Starting values that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga) move a part of the base's
# weight into A and B. Such an adapter fits only the base changed so, unless PEFT subtracted the start when it saved.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def require_plain_lora(config: Mapping, where: object) -> None:
    """UserError for the first field that makes an adapter more than `weight += scale * B @ A`."""

    def refuse(field: str, value: object, why: str, next_step: str) -> UserError:
        return UserError(
            f"adapter not supported ({why})",
            where=where,
            got=f"{field}={str(value)[:80]}",
            expected="plain LoRA",
            next_step=next_step,
        )

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", config.get("peft_type"), "another method than LoRA", "train with LoraConfig")
    for field, (why, next_step) in REFUSED.items():
        if not _off(field, config.get(field)):
            raise refuse(field, config[field], why, next_step)
    start = config.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in PLAIN_STARTS):
        raise refuse(
            "init_lora_weights",
            start,
            "these starting values may have changed the base's weight",
            "save it again with path_initial_model_for_weight_conversion, or train with init_lora_weights=True",
        )
    for field in sorted(config.keys() - READ - READ_BEYOND_PEFT - WITHOUT_EFFECT - REFUSED.keys()):
        if not _off(field, config[field]):
            why = "a field that this version does not know"
            raise refuse(field, config[field], why, "install a newer gptoss-nf4, or remove the field if it has no effect")


def _off(field: str, value: object) -> bool:
    """Whether a switch is off. PEFT writes None, False or something empty for that, and "none" for `bias`."""
    return is_off(value) or (field == "bias" and value == "none")

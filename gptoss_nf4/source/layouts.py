"""Telling layouts of gpt-oss checkpoints apart by their keys, and saying what to do with those we do not convert."""

import re

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.checkpoint import Checkpoint

SPLIT = "split"

# (name, a key that only this layout has, what to do), first match wins.
_OTHER_LAYOUTS = (
    (
        "LoRA adapter that is not merged",
        re.compile(r"\.lora_[AB]\."),
        "save it with Unsloth's save_pretrained_merged(..., save_method='merged_4bit_forced')",
    ),
    (
        "stock MXFP4",
        re.compile(r"\.experts\.gate_up_proj_blocks$"),
        "vLLM serves this checkpoint as it is; there is nothing to convert",
    ),
    (
        "fused experts with a quantization state",
        re.compile(r"\.experts\.gate_up_proj\.absmax$"),
        "its blocks run along the output dimension and cannot be moved exactly; save it in Unsloth's split layout",
    ),
    (
        "16-bit experts with 4-bit attention (transformers 5 bitsandbytes save)",
        re.compile(r"self_attn\.q_proj\.weight\.absmax$"),
        "these experts were never 4-bit; save the fine-tune in Unsloth's split layout",
    ),
    (
        "plain 16-bit",
        re.compile(r"\.experts\.gate_up_proj$"),
        "nothing in it is 4-bit; serve it as it is, or fine-tune from unsloth/gpt-oss-20b-unsloth-bnb-4bit",
    ),
)
_FUSED_EXPERTS = re.compile(r"\.experts\.gate_up_proj$")
_SPLIT_EXPERTS = re.compile(r"\.mlp\.experts\.gate_up_projs\.\d+\.weight$")


def require_split(checkpoint: Checkpoint) -> str:
    """Return "split", or raise a UserError that names the layout found and what to do with it."""
    keys = checkpoint.tensors
    if any(_SPLIT_EXPERTS.search(key) for key in keys) and not any(".lora_" in key for key in keys):
        return SPLIT
    found, next_step = "an unknown layout", "convert a checkpoint in Unsloth's split layout"
    for name, pattern, advice in _OTHER_LAYOUTS:
        if any(pattern.search(key) for key in keys):
            found, next_step = name, advice
            break
    fused = [keys[key] for key in keys if _FUSED_EXPERTS.search(key)]
    if fused and fused[0].dtype == "U8" and f"{fused[0].name}.absmax" not in keys:
        found = "fused 4-bit experts without a quantization state"
        next_step = "the scales are lost and the weights cannot be recovered; save the fine-tune again"
    raise UserError(
        "unsupported layout",
        where=checkpoint.directory,
        got=found,
        expected="the split layout (mlp.experts.gate_up_projs.<e>.weight)",
        next_step=next_step,
    )

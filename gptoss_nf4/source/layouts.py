"""The layouts of gpt-oss checkpoints: which can be read, and the advice for the others."""

import re
from pathlib import Path

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.config_fields import served_config
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.split import SplitSource
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.reading import read_json_object, require_plain_files

# One class for each layout. The first that recognises a checkpoint opens it.
LAYOUTS: tuple[type[Source], ...] = (SplitSource,)

# (name, pattern of a tensor name that tells the layout, advice). The first match counts.
_OTHER_LAYOUTS = (
    (
        "a LoRA adapter",
        re.compile(r"\.lora_[AB]\."),
        "convert its base and serve both: python stages/configure.py model=gpt_oss_20b 'adapters={mine: DIRECTORY}'",
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


def open_checkpoint(directory: Path) -> Source:
    """Open the checkpoint in `directory` by the class of its layout. UserError where no class recognises it."""
    if directory.is_dir():
        require_plain_files(directory)
    checkpoint = Checkpoint(directory)
    for layout in LAYOUTS:
        if layout.recognises(checkpoint):
            return layout(checkpoint)
    raise _unsupported(checkpoint)


def _unsupported(checkpoint: Checkpoint) -> UserError:
    """The error that names the layout found and says what to do with it."""
    keys = checkpoint.tensors
    found, next_step = "an unknown layout", "convert a checkpoint in Unsloth's split layout"
    for name, pattern, advice in _OTHER_LAYOUTS:
        if any(pattern.search(key) for key in keys):
            found, next_step = name, advice
            break
    fused = [keys[key] for key in keys if _FUSED_EXPERTS.search(key)]
    if fused and fused[0].dtype == "U8" and f"{fused[0].name}.absmax" not in keys:
        found = "fused 4-bit experts without a quantization state"
        next_step = "the scales are lost and the weights cannot be recovered; save the fine-tune again"
    return UserError(
        "unsupported layout",
        where=checkpoint.directory,
        got=found,
        expected="the split layout (mlp.experts.gate_up_projs.<e>.weight)",
        next_step=next_step,
    )


def layer_count(directory: Path) -> int:
    """Number of layers of the checkpoint in `directory`. Only its config.json is read, and checked as `Source` does."""
    path = directory / "config.json"
    return Dimensions.from_config(served_config(read_json_object(path), path), path).layers

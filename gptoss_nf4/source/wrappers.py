"""Undoing what wrappers do to names: a module that holds the model, or a part of it, adds its own attribute to the path.

Only names change. A wrapper that changes the weights, as an adapter does, has tensors of its own and is refused elsewhere.
"""

from collections import Counter

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.tensor_reader import TensorInfo

# Attributes that wrappers put anywhere into a path. None is a name of gpt-oss.
WRAPPERS = frozenset(
    {
        "_orig_mod",  # torch.compile
        "module",  # DistributedDataParallel, DeepSpeed
        "_fsdp_wrapped_module",  # FullyShardedDataParallel
        "_checkpoint_wrapped_module",  # torch's activation checkpointing
        "base_layer",  # PEFT, around the layer that an adapter changes
    }
)
# A name that every gpt-oss has. What stands before it, stands before all names: `base_model.model.` of PEFT,
# `pretrained_model.` of TRL, `model.` of Lightning.
ANCHOR = "model.embed_tokens.weight"


def unwrapped(tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """(`tensors` by the model's own names, number of names from which each wrapper was removed).

    UserError where two names become one: then the file holds more than a renamed model.
    """
    removed: Counter[str] = Counter()
    plain = {name: _without_wrappers(name, removed) for name in tensors}
    prefix = next((name.removesuffix(ANCHOR) for name in plain.values() if name.endswith(f".{ANCHOR}")), "")
    if prefix and all(name.startswith(prefix) for name in plain.values()):
        removed[prefix] = len(plain)
        plain = {name: own.removeprefix(prefix) for name, own in plain.items()}
    found: dict[str, TensorInfo] = {}
    for name, own in plain.items():
        if own in found:
            raise UserError(
                "two tensors of one name",
                where=tensors[name].file,
                got=f"{found[own].name} and {name}",
                expected=f"one tensor that is {own}",
                next_step="remove the one that does not belong to the model",
            )
        found[own] = tensors[name]
    return found, dict(removed)


def _without_wrappers(name: str, removed: Counter[str]) -> str:
    parts = name.split(".")
    removed.update({part for part in parts if part in WRAPPERS})
    return ".".join(part for part in parts if part not in WRAPPERS)

"""The published layout, called split: each expert's projections are weights of their own, under canonical names.

Published checkpoints have all of them in 4 bit. Any may be in 16 or 32 bit instead.
"""

import re

from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.stored import ALIASES, StoredSource
from gptoss_nf4.storage.checkpoint import Checkpoint

_EXPERTS = re.compile(r"\.mlp\.experts\.gate_up_projs\.\d+\.weight$")


def kept_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shapes of `names.kept_shapes`, by the names within a layer that published checkpoints have."""
    return {ALIASES.get(name, name): shape for name, shape in names.kept_shapes(d).items()}


class SplitSource(StoredSource):
    """A checkpoint in the split layout."""

    layout = "split"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return any(_EXPERTS.search(key) for key in checkpoint.tensors)

"""bitsandbytes.functional without PyTorch's compiler: `from gptoss_nf4.eager_bnb import bnb`.

`import bitsandbytes` hands a few functions to torch.compile (0.50.2, backends/default/ops.py), and that alone loads the
compiler: 3.4 of the 4.3 seconds that it takes. Nothing here needs them compiled. So they stay as they are, which is what
bitsandbytes does by itself where nothing can be compiled.
"""

from collections.abc import Callable

import torch


def _as_it_is(function: Callable | None = None, **_: object) -> Callable:
    """Stands for torch.compile, which is called with a function, or as a decorator with settings."""
    return (lambda decorated: decorated) if function is None else function


_compile = torch.compile
torch.compile = _as_it_is
try:
    import bitsandbytes.functional as bnb
finally:
    torch.compile = _compile

__all__ = ["bnb"]

"""bitsandbytes.functional without PyTorch's compiler: `from gptoss_nf4.eager_bnb import bnb`.

`import bitsandbytes` (0.50.2) hands a few functions to torch.compile, and that alone loads the compiler: 3.4 of the 4.3
seconds that it takes. Nothing here needs them compiled, so they stay as they are. bitsandbytes leaves them so too where
nothing can be compiled. And PyTorch keeps its compiler from looking into each of bitsandbytes' kernels, for which the first
call would load it. Here that is left out as long as there is no compiler.
"""

import sys
from collections.abc import Callable
from functools import wraps

import torch


def _as_it_is(function: Callable | None = None, **_: object) -> Callable:
    """Stands for torch.compile, which is called with a function, or as a decorator with settings."""
    return (lambda decorated: decorated) if function is None else function


def _hidden_once_it_is_loaded(function: Callable) -> Callable:
    """`function`, and as torch._disable_dynamo makes it once the compiler is loaded."""
    hidden = _disable_dynamo(function)

    @wraps(function)
    def call(*arguments: object, **named: object) -> object:
        return (hidden if "torch._dynamo" in sys.modules else function)(*arguments, **named)

    return call


_compile, _disable_dynamo = torch.compile, torch._disable_dynamo
torch.compile, torch._disable_dynamo = _as_it_is, _hidden_once_it_is_loaded
try:
    import bitsandbytes.functional as bnb
finally:
    torch.compile, torch._disable_dynamo = _compile, _disable_dynamo

__all__ = ["bnb"]

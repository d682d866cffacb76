"""Warnings of vLLM and torch that mean nothing in our runs. Each is known by its origin and its words; others pass."""

import logging
import warnings
from dataclasses import dataclass

# On a CPU the plugin uses no Triton kernel, and the engine settings ask for eager mode: there is nothing to act on.
LOGGED = {
    "vllm.triton_utils.importing": ("Triton is installed, but doesn't include CPU backend.",),
    "vllm.platforms.cpu": ("Triton is not installed. triton-cpu is expected on x86 CPUs.",),
    "vllm.config.vllm": (
        "Model Runner V2 requires Triton; using the V1 model runner instead.",
        "Enforce eager set, disabling torch.compile",
        "Inductor compilation was disabled by user settings",
    ),
}


@dataclass(frozen=True)
class Warned:
    """A warning of Python's: the beginning of its text and the module that it is shown for, as regular expressions."""

    message: str
    category: type[Warning]
    module: str


WARNED = (
    # vLLM looks at every attribute of torch.distributed.
    Warned(r"`torch\.distributed\.reduce_op` is deprecated", FutureWarning, r"vllm\.triton_utils\.dispatcher"),
)


class _LeftOut(logging.Filter):
    """Lets everything pass but what begins with one of `beginnings`."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginnings)


def leave_out_noise() -> None:
    """Leave these out in this process and its forks. To be called before vLLM is imported; once is enough."""
    for name, beginnings in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _LeftOut) for each in logger.filters):
            logger.addFilter(_LeftOut(beginnings))
    for each in WARNED:
        warnings.filterwarnings("ignore", each.message, each.category, each.module)

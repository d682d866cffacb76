"""The `vllm.general_plugins` entry point: teaches every vLLM process the quantization method `gptoss_nf4`."""

import logging
from functools import cache

from gptoss_nf4.format.result import QUANT_METHOD

TESTED_VERSIONS = ("0.32.0",)
logger = logging.getLogger("vllm.gptoss_nf4")


def register() -> None:
    """Add the method to vLLM's table; vLLM then picks it where config.json's quantization_config names it.

    Called in each process, for every model, so it must not break models that are not ours: where a seam of vLLM is
    missing it logs one line and leaves the method unknown.
    """
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
        from vllm.model_executor.models.registry import ModelRegistry

        from gptoss_nf4.vllm.config import GptOssNf4Config
        from gptoss_nf4.vllm.model import GptOssForCausalLM
    except ImportError as error:
        logger.error(
            "gptoss_nf4: this vLLM has no place for the plugin (%s); converted checkpoints will not load; "
            "install vllm==%s or a newer gptoss-nf4",
            error,
            TESTED_VERSIONS[-1],
        )
        return
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(GptOssNf4Config)
        ModelRegistry.register_model("GptOssForCausalLM", GptOssForCausalLM)  # vLLM's own, but for checkpoints of ours


@cache
def warn_if_untested(version: str) -> bool:
    """Log one warning a process where this vLLM is not one that the tests ran on; returns whether it did."""
    from packaging.version import Version

    if Version(version).base_version in TESTED_VERSIONS:
        return False
    logger.warning(
        "gptoss_nf4: vLLM %s is untested with this plugin (tested: %s); compare its output with `dvc repro smoke`",
        version,
        ", ".join(TESTED_VERSIONS),
    )
    return True

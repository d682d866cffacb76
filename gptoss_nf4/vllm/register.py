"""The `vllm.general_plugins` entry point: teaches every vLLM process the quantization method `gptoss_nf4`.

vLLM calls `register` in each process and for every model. So it imports nothing heavy, and an error in it must not end a
process that serves another model: it logs one line, and the method stays unknown.
"""

import logging

from gptoss_nf4.format.result import QUANT_METHOD

logger = logging.getLogger("vllm.gptoss_nf4")


def register() -> None:
    """Add the method to vLLM's table of methods, and our subclass of its gpt-oss to its table of models.

    vLLM uses the method where config.json's quantization_config names it. It uses the subclass for every gpt-oss, and the
    subclass leaves those that are not ours unchanged. The model is registered by name, so it is imported only when loaded.
    """
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
        from vllm.model_executor.models.registry import ModelRegistry

        from gptoss_nf4.vllm.config import GptOssNf4Config

        if QUANT_METHOD not in QUANTIZATION_METHODS:
            register_quantization_config(QUANT_METHOD)(GptOssNf4Config)
            ModelRegistry.register_model("GptOssForCausalLM", "gptoss_nf4.vllm.model:GptOssForCausalLM")
    except Exception as error:  # whatever a future vLLM does there, other models must go on
        logger.error(
            "gptoss_nf4: this vLLM has no place for the plugin (%s: %s); converted checkpoints will not load; "
            "install a vLLM that the plugin was tested with, or a newer gptoss-nf4",
            type(error).__name__,
            " ".join(str(error).split()),
        )

"""transformers' GptOssConfig without its models: `from gptoss_nf4.proof.bare_config import GptOssConfig`.

transformers 5 writes a docstring for the class while it is imported, and looks for the model's class to do so. That loads
all that models need, PyTorch's compiler too: 87 MiB and 2 seconds, in a process that asks for a configuration alone. Where
the table of models cannot be imported, transformers leaves that part of the docstring out. So for this import it cannot.
"""

import sys

_MODELS = "transformers.models.auto.modeling_auto"

_hidden = _MODELS not in sys.modules
if _hidden:
    sys.modules[_MODELS] = None  # type: ignore[assignment]  # an import of it then raises ImportError
try:
    from transformers import GptOssConfig
finally:
    if _hidden:
        del sys.modules[_MODELS]

__all__ = ["GptOssConfig"]

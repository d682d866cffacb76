"""Which versions of vLLM the plugin was tested with."""

import logging
from functools import cache

from packaging.version import Version

TESTED_VERSIONS = ("0.32.0",)
logger = logging.getLogger("vllm.gptoss_nf4")


@cache
def warn_if_untested(version: str) -> bool:
    """Log one warning a process where this vLLM is not one that the tests ran on; returns whether it did."""
    if Version(version).base_version in TESTED_VERSIONS:
        return False
    logger.warning(
        "gptoss_nf4: vLLM %s is untested with this plugin (tested: %s); compare its output with `dvc repro smoke`",
        version,
        ", ".join(TESTED_VERSIONS),
    )
    return True

"""The versions of vLLM that the plugin was tested with."""

import logging
from functools import cache

from packaging.version import Version

# 0.33.0 with the torch 2.14.0 and Triton 3.8.0 that it pins (NOTES.md).
TESTED_VERSIONS = ("0.32.0", "0.33.0")
logger = logging.getLogger("vllm.gptoss_nf4")


def is_tested(version: str) -> bool:
    """Whether `version`, of any build, is one of TESTED_VERSIONS."""
    return Version(version).base_version in TESTED_VERSIONS


@cache
def warn_if_untested(version: str) -> bool:
    """Log a warning, once a process, where `version` is not a tested one. Returns whether it is untested."""
    if is_tested(version):
        return False
    logger.warning(
        "gptoss_nf4: vLLM %s is untested with this plugin (tested: %s); compare its output with `dvc repro smoke`",
        version,
        ", ".join(TESTED_VERSIONS),
    )
    return True

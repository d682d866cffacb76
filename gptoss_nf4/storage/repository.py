"""Telling a repository of the Hugging Face hub from a path on this machine."""

import re
from pathlib import Path

OWNER_AND_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_repository(given: str) -> bool:
    """Whether `given` is a repository: it has the form owner/name, and there is no such path here."""
    return OWNER_AND_NAME.fullmatch(given) is not None and not Path(given).expanduser().exists()

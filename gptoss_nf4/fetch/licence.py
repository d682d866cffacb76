"""What a source's own model card says of its licence and of the model that it was made from."""

import re
from pathlib import Path

from gptoss_nf4.storage.artifacts import CARD
from gptoss_nf4.storage.repository import OWNER_AND_NAME

MAX_CARD_BYTES = 1 << 20  # cards have some kilobytes; this one is a stranger's
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s*(?:\n|$)", re.DOTALL)
IDENTIFIER = re.compile(r"[\w.+-]{1,64}")  # of a licence: apache-2.0, llama3.1


def licence(directory: Path) -> dict:
    """`license` and `base_model` of the card in `directory`, None for what it does not say in a form that the Hub knows."""
    fields = _front_matter(directory / CARD)
    license_, base = fields.get("license"), fields.get("base_model")
    if isinstance(base, list) and len(base) == 1:  # as cards often write it
        base = base[0]
    return {
        "license": license_ if isinstance(license_, str) and IDENTIFIER.fullmatch(license_) else None,
        "base_model": base if isinstance(base, str) and OWNER_AND_NAME.fullmatch(base) else None,
    }


def _front_matter(card: Path) -> dict:
    """The YAML at the start of a card; empty where there is none that can be read.

    It is a stranger's: only texts, lists and mappings are made of it. Other types have constructors that fail in their own
    ways, and merged keys can grow without end.
    """
    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return {}
    from yaml import BaseLoader, YAMLError, load

    try:
        found = FRONT_MATTER.match(card.read_text("utf-8"))
        fields = load(found[1], Loader=BaseLoader) if found else {}
    except (OSError, ValueError, YAMLError, RecursionError):  # ValueError: not UTF-8
        return {}
    return fields if isinstance(fields, dict) else {}

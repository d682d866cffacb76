"""Whether an adapter was trained on this base, as far as names can tell.

A fine-tune in 4 bit is exact only on the NF4 weights that it was trained on, say unsloth/gpt-oss-20b-unsloth-bnb-4bit.
openai/gpt-oss-20b (MXFP4) and unsloth/gpt-oss-20b have the same dimensions. So an adapter trained on them loads without an
error, but its deltas were made for other weights.
"""

import os
import re
from dataclasses import dataclass
from enum import Enum

from gptoss_nf4.storage.repository import is_repository

FAMILY = re.compile(r"gpt-oss-(?:safeguard-)?\d+b", re.IGNORECASE)
HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots(?:/|$)")


class Verdict(Enum):
    """Whether the adapter's base is ours."""

    EXACT = "exact"  # the same weights
    OTHER_WEIGHTS = "other weights"  # the same model with other weights, such as MXFP4
    OTHER_MODEL = "other model"  # such as gpt-oss-120b instead of 20b
    UNKNOWN = "unknown"  # the names do not tell


@dataclass(frozen=True)
class BaseMatch:
    """The result of `match_base`."""

    verdict: Verdict
    statement: str
    """One sentence for the user."""


def match_base(trained_on: str | None, base: str, *also: str) -> BaseMatch:
    """Compare an adapter's `base_model_name_or_path` with the names of a base: `base` and `also`.

    Names are Hub repositories or paths. The statement calls the base `base`.
    """
    known_as = (base, *also)
    if not trained_on:
        return BaseMatch(Verdict.UNKNOWN, f"The adapter does not say what it was trained on; {base} is assumed.")
    if any(_same(trained_on, name) for name in known_as):
        return BaseMatch(Verdict.EXACT, f"The adapter was trained on this base, {trained_on}.")
    family = _family(trained_on)
    families = {_family(name) for name in known_as} - {None}
    if family is None or not families:
        return BaseMatch(Verdict.UNKNOWN, f"The adapter was trained on {trained_on}; whether that is {base} is unknown.")
    if family not in families:
        return BaseMatch(
            Verdict.OTHER_MODEL, f"The adapter was trained on {trained_on}, which is another model than {base}."
        )
    return BaseMatch(
        Verdict.OTHER_WEIGHTS,
        f"The adapter was trained on {trained_on}, whose weights are not those of {base}: it will run, but not exactly as "
        "trained.",
    )


def _same(one: str, other: str) -> bool:
    """Whether two names mean the same weights: one repository, one directory, or a local copy named like a repository."""
    one_repository, other_repository = _repository(one), _repository(other)
    if one_repository and other_repository:
        return one_repository == other_repository
    if not one_repository and not other_repository and os.path.realpath(one) == os.path.realpath(other):
        return True
    return _family(one) is not None and _last_part(one) == _last_part(other)


def _repository(name: str) -> str | None:
    """owner/name, in lower case, of a Hub repository or of a snapshot in the Hub's cache. None for any other path."""
    cached = HUB_CACHE.search(name)
    if cached:
        return f"{cached[1]}/{cached[2]}".lower()
    return name.lower() if is_repository(name) else None


def _family(name: str) -> str | None:
    """gpt-oss-20b or the like, in lower case. None where the name does not tell."""
    found = FAMILY.findall(name)
    return found[-1].lower() if found else None


def _last_part(name: str) -> str:
    return (_repository(name) or name).rstrip("/").rpartition("/")[2].lower()

"""PEFT's rules for `rank_pattern` and `alpha_pattern`: which pattern, if any, a module's name matches.

A pattern is a regular expression for the whole name, or for its end behind a dot. The first one that matches counts (PEFT
`utils/other.py: get_pattern_key`). Most patterns are plain names, and one adapter may have thousands of them.
"""

import re
from collections.abc import Mapping
from typing import Generic, TypeVar

from gptoss_nf4.errors import UserError

# Adapters come from strangers, and a regular expression can take exponential time in Python. These bounds keep each match
# below a few milliseconds. Plain names match in one step, so only their length is bounded.
MAX_EXPRESSIONS = 64
MAX_LENGTH = 200
MAX_CHOICES = 4  # repetitions and groups of one pattern
PLAIN = re.compile(r"\^?(?:[\w.]|\\\.)*?(?P<ending>\w*)\$?")
T = TypeVar("T")


class Patterns(Generic[T]):
    """Values by pattern.

    >>> Patterns({"q_proj": 32, r"layers\\.[01]\\..*": 8}, where="rank_pattern").get("model.layers.0.self_attn.k_proj", 16)
    8
    """

    def __init__(self, values: Mapping[str, T], where: object):
        """UserError, which names `where`, for a pattern that is no regular expression or could take long."""
        self.where = where
        self._rules = [self._rule(pattern, value) for pattern, value in values.items()]
        expressions = [pattern for pattern in values if not PLAIN.fullmatch(pattern)]
        if len(expressions) > MAX_EXPRESSIONS:
            raise self._bad(f"{len(expressions)} regular expressions", f"at most {MAX_EXPRESSIONS}, or plain names")

    def get(self, module: str, default: T) -> T:
        """The value of the first pattern that `module` matches, else `default`."""
        for ending, expression, value in self._rules:
            if module.endswith(ending) and expression.match(module):
                return value
        return default

    def _rule(self, pattern: str, value: T) -> tuple[str, re.Pattern, T]:
        """(ending of every name that matches, compiled pattern, value). Comparing the ending first only saves time."""
        if len(pattern) > MAX_LENGTH:
            raise self._bad(f"a pattern of {len(pattern)} characters", f"at most {MAX_LENGTH}")
        plain = PLAIN.fullmatch(pattern)
        if not plain:
            choices = re.findall(r"[*+?{(]", pattern.replace("(?:", "("))
            if len(choices) > MAX_CHOICES or re.search(r"\)[*+?{]", pattern):
                expected = f"at most {MAX_CHOICES} repetitions and groups, and no group repeated"
                raise self._bad(repr(pattern), expected)
        try:
            expression = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise self._bad(f"{pattern!r} ({error})", "a regular expression") from None
        return plain["ending"] if plain else "", expression, value

    def _bad(self, got: str, expected: str) -> UserError:
        return UserError(
            "bad pattern", where=self.where, got=got, expected=expected, next_step="write the modules' names out"
        )

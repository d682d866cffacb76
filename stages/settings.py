"""Settings as typed in a shell: reading `key=value`, whatever the value contains.

Used by configure.py alone. The stages read what it wrote.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import yaml
from checks import bad, mapping
from omegaconf import OmegaConf
from params import YAML_ERRORS

from gptoss_nf4.errors import UserError, first_line

# Taken as they are typed: no character has a meaning. Nothing, or null, is no value.
TEXTS = (
    *(f"model.{key}" for key in ("name", "path", "base", "repository", "revision", "expected")),
    "requant.merge",
)
# Keys below these are vLLM's or the system's; new ones may be added.
OPEN = ("engine.args.", "engine.env.")
FRACTION = re.compile(r"\d{1,9}/\d{1,9}")
EXPONENT = re.compile(r"[\d.]+[eE][+-]?\d+")  # without a dot or a sign, YAML takes it for a text


def no_setting(key: str, known: Mapping) -> UserError:
    return UserError(
        "no such setting",
        where="params.yaml",
        got=key,
        expected=f"one of {', '.join(sorted(map(str, known)))}",
        next_step="see conf/",
    )


def split(typed: Sequence[str]) -> dict[str, str]:
    """What was typed, by key. UserError for anything that is not `key=value`. Hydra's `+key=value` is `key=value`."""
    found = {}
    for argument in typed:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise bad("command line", argument, "key=value, such as model=local or dtype=bfloat16")
        found[key.lstrip("+")] = value
    return found


def value_of(key: str, typed: str) -> object:
    """The value that `typed` stands for: itself for a text, else what it is in YAML. Fractions are numbers."""
    if key in TEXTS or key.startswith("engine.env."):
        return None if typed in ("", "null") else typed
    try:
        value = yaml.safe_load(typed)
    except YAML_ERRORS as error:
        raise bad(key, typed[:80], f"a value in YAML ({first_line(error)})") from None
    try:
        if isinstance(value, str) and FRACTION.fullmatch(value):
            return float(Fraction(value))
        return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value
    except (ValueError, ArithmeticError):
        return value


def put(settings: dict, key: str, value: object) -> None:
    """Set `key`, with dots between its parts. UserError where there is no such setting."""
    *sections, last = key.split(".")
    place: object = settings
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    if not isinstance(place, dict) or (last not in place and not key.startswith(OPEN)):
        raise no_setting(key, place if isinstance(place, dict) else settings)
    if isinstance(place.get(last), dict) and not isinstance(value, dict):
        mapping(key, value)
    place[last] = value


def require_writable(key: str, value: object) -> None:
    """UserError for a text that no file can hold, or that YAML or `${` would change: DVC's and Hydra's for other settings.

    A file's name that is not UTF-8 is no text: Python has halves of characters for its bytes.
    """
    if isinstance(value, dict):
        for name, each in value.items():
            require_writable(str(name), each)
    elif isinstance(value, list):
        for each in value:
            require_writable(key, each)
    elif isinstance(value, str) and not _is_writable(value):
        raise bad(key, value, "a text that params.yaml can hold", "rename it, or make a link with a plainer name")


def _is_writable(value: str) -> bool:
    try:
        value.encode()  # YAML would escape half a character
        return "${" not in value and yaml.safe_load(OmegaConf.to_yaml({"x": value}).encode()) == {"x": value}
    except YAML_ERRORS:  # UnicodeEncodeError is a ValueError
        return False

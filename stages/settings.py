"""Settings as typed in a shell: reading `key=value`, whatever the value contains, and refusing bad ones.

Used by configure.py alone. The stages read what it wrote.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import yaml
from omegaconf import OmegaConf

from gptoss_nf4.convert.plan import MODES
from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.format import residual
from gptoss_nf4.format.dtypes import DTYPES
from gptoss_nf4.format.quant_state import BLOCKSIZES, QUANT_TYPES
from gptoss_nf4.format.rows import W13_ORDERS
from gptoss_nf4.source.model import check_model_name
from gptoss_nf4.storage.repository import OWNER_AND_NAME

# A check gets a setting's key and its value, and raises UserError for a bad one.
Check = Callable[[str, object], None]

# Taken as they are typed: no character has a meaning. Nothing, or null, is no value.
TEXTS = (
    *(f"model.{key}" for key in ("name", "path", "base", "repository", "revision", "expected")),
    "requant.merge",
)
# Keys below these are vLLM's or the system's; new ones may be added.
OPEN = ("engine.args.", "engine.env.")
REVISION = re.compile(r"\w[\w./-]*")
FRACTION = re.compile(r"\d{1,9}/\d{1,9}")
EXPONENT = re.compile(r"[\d.]+[eE][+-]?\d+")  # without a dot or a sign, YAML takes it for a text


def bad(key: str, got: object, expected: object, next_step: str = "correct it and run the command again") -> UserError:
    return UserError("bad setting", where=key, got=repr(got), expected=expected, next_step=next_step)


def no_setting(key: str, known: Mapping) -> UserError:
    return UserError(
        "no such setting",
        where="params.yaml",
        got=key,
        expected=f"one of {', '.join(sorted(map(str, known)))}",
        next_step="see conf/",
    )


def one_of(choices: Sequence) -> Check:
    def check(key: str, value: object) -> None:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise bad(key, value, f"one of {', '.join(map(str, choices))}")

    return check


def within(smallest: float, largest: float, kinds: tuple[type, ...] = (int, float)) -> Check:
    def check(key: str, value: object) -> None:
        if type(value) not in kinds or not smallest <= value <= largest:  # type: ignore[operator]
            what = "a number" if float in kinds else "a whole number"
            raise bad(key, value, f"{what} from {smallest:g}" + (f" to {largest:g}" if largest < 1e9 else ""))

    return check


def list_of(each: Check) -> Check:
    def check(key: str, value: object) -> None:
        if not isinstance(value, list) or not value:
            raise bad(key, value, "a list, such as [a, b]")
        for item in value:
            each(key, item)

    return check


def optional(check: Check) -> Check:
    return lambda key, value: None if value is None else check(key, value)


def text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise bad(key, value, "a text")


def mapping(key: str, value: object) -> None:
    if not isinstance(value, dict):
        raise bad(key, value, f"single keys, such as {key}.KEY=VALUE")


def layers(key: str, value: object) -> None:
    if not isinstance(value, list) or not value or value != list(range(len(value))):
        raise bad(key, value, "all layers from 0 on, such as [0,1]")


def revision(key: str, value: object) -> None:
    if not isinstance(value, str) or not REVISION.fullmatch(value) or ".." in value:
        raise bad(key, value, "a commit, a branch or a tag")


def existing_file(key: str, value: object) -> None:
    if not isinstance(value, str) or not os.path.isfile(value):
        raise bad(key, value, "a file", "check the path, or make the list with `sha256sum * > FILE` in the source")


def residual_scale(key: str, value: object) -> None:
    residual.resolve(value, DTYPES[0])


def repository(key: str, value: object) -> None:
    if not isinstance(value, str) or not OWNER_AND_NAME.fullmatch(value):
        raise bad(key, value, "owner/name, as in the address of a repository on huggingface.co")


count = within(1, 1e9, (int,))
CHECKS: dict[str, Check] = {
    "model.name": lambda key, value: check_model_name(str(value), key),
    "model.path": optional(text),
    "model.repository": optional(repository),
    "model.revision": optional(revision),
    "model.expected": optional(existing_file),
    "model.layers": layers,
    "dtype": one_of(DTYPES),
    "residual_scale": residual_scale,
    "requant.mode": one_of(MODES),
    "requant.w13_order": one_of(W13_ORDERS),
    "requant.quant_type": one_of(QUANT_TYPES),
    "requant.blocksize": one_of(BLOCKSIZES),
    "requant.device": one_of(("auto", "cpu", "cuda")),
    "engine.args": mapping,
    "engine.env": mapping,
    "engine.max_float32_difference": optional(within(0, 1e9)),
    "engine.max_minutes": optional(within(0, 1e9)),
    "smoke.prompts": list_of(text),
    "smoke.max_tokens": count,
    "smoke.min_top1_agreement": within(0, 1),
    "benchmark.batch_sizes": list_of(count),
    "benchmark.input_tokens": count,
    "benchmark.output_tokens": count,
    "benchmark.rounds": count,
}


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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, a number of thousands of digits
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


def check(settings: dict) -> None:
    """UserError for the first bad value, wherever it came from."""
    for key, each in CHECKS.items():
        section, _, last = key.partition(".")
        value = settings.get(section)
        if last and not isinstance(value, dict):
            mapping(section, value)
        each(key, value.get(last) if last and isinstance(value, dict) else value)


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
        value.encode()
        return "${" not in value and yaml.safe_load(OmegaConf.to_yaml({"x": value})) == {"x": value}
    except (UnicodeEncodeError, yaml.YAMLError):
        return False

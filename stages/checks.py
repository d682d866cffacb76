"""What each setting may be. configure.py checks what is typed, each stage what it reads from params.yaml."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import residual
from gptoss_nf4.format.config_fields import MAX_WIDTH
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.dtypes import DTYPES
from gptoss_nf4.format.quant_state import BLOCKSIZES, QUANT_TYPES
from gptoss_nf4.format.rows import W13_ORDERS
from gptoss_nf4.source.model import KINDS, check_model_name
from gptoss_nf4.storage.repository import OWNER_AND_NAME

# A check gets a setting's key and its value, and raises UserError for a bad one.
Check = Callable[[str, object], None]

REVISION = re.compile(r"\w[\w./-]*")
ADAPTER_FIELDS = ("path", "repository", "revision", "any_base")


def bad(key: str, got: object, expected: object, next_step: str = "correct it and run the command again") -> UserError:
    return UserError("bad setting", where=key, got=repr(got), expected=expected, next_step=next_step)


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


def dimensions(key: str, value: object) -> None:
    """Of a synthetic model: every field of Dimensions but the layers, which `model.layers` counts."""
    names = {field.name for field in fields(Dimensions)} - {"layers"}
    if not isinstance(value, dict) or value.keys() != names:
        raise bad(key, value, f"the keys {', '.join(sorted(names))}", "name the model again, such as model=synthetic_20b")
    for name, number in value.items():
        within(1, MAX_WIDTH, (int,))(f"{key}.{name}", number)


def adapters(key: str, value: object) -> None:
    """Every adapter with all fields that configure.py writes. What they name is checked where it is read."""
    mapping(key, value)
    for name, entry in value.items() if isinstance(value, dict) else ():
        if not isinstance(entry, dict) or set(ADAPTER_FIELDS) - entry.keys():
            raise _no_adapter(f"{key}.{name}", entry)
        for field in ADAPTER_FIELDS:
            kinds = (bool,) if field == "any_base" else (str, type(None))
            if type(entry[field]) not in kinds:
                raise _no_adapter(f"{key}.{name}.{field}", entry[field])


def _no_adapter(key: str, got: object) -> UserError:
    next_step = "run `python stages/configure.py` with what you changed, such as adapters.NAME=DIRECTORY"
    return bad(key, got, "what configure.py writes", next_step)


def residual_scale(key: str, value: object) -> None:
    residual.resolve(value, DTYPES[0])


def repository(key: str, value: object) -> None:
    if not isinstance(value, str) or not OWNER_AND_NAME.fullmatch(value):
        raise bad(key, value, "owner/name, as in the address of a repository on huggingface.co")


count = within(1, 1e9, (int,))
CHECKS: dict[str, Check] = {
    "model.kind": one_of(KINDS),
    "model.name": lambda key, value: check_model_name(str(value), key),
    "model.path": optional(text),
    "model.repository": optional(repository),
    "model.revision": optional(revision),
    "model.expected": optional(existing_file),
    "model.layers": layers,
    "model.dimensions": optional(dimensions),
    "dtype": one_of(DTYPES),
    "residual_scale": residual_scale,
    "requant.w13_order": one_of(W13_ORDERS),
    "requant.quant_type": one_of(QUANT_TYPES),
    "requant.blocksize": one_of(BLOCKSIZES),
    "requant.device": one_of(("auto", "cpu", "cuda")),
    "requant.merge": optional(text),
    "merge_input": text,
    "adapter_reports": text,
    "engine.name": text,
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


def check(settings: Mapping, checks: Mapping[str, Check] = CHECKS) -> None:
    """UserError for the first bad value, wherever it came from."""
    for key, each in checks.items():
        section, _, last = key.partition(".")
        value = settings.get(section)
        if last and not isinstance(value, dict):
            mapping(section, value)
        each(key, value.get(last) if last and isinstance(value, dict) else value)

"""Reading params.yaml, which anyone may have edited: it is a set of settings, or there is one line that says why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.reading import read_bytes, read_text

PARAMS = Path("params.yaml")
CONF = Path(__file__).resolve().parent.parent / "conf"
# What reading YAML may raise: its own errors; ValueError for a date that is none and a number of thousands of digits;
# RecursionError for brackets in brackets; TypeError and AttributeError for a key that is a mapping.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError)


def broken(got: object) -> UserError:
    """The error for a params.yaml that is no set of settings."""
    return UserError(
        "broken settings",
        where=PARAMS,
        got=got,
        expected="what configure.py writes",
        next_step="run `python stages/configure.py model=...` again; without arguments it goes back to the embedded model",
    )


def reason(error: BaseException) -> str:
    """What a library says is wrong, in one line of at most 300 characters; the error's type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def reading_conf() -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise about a file in conf/ into a UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, OSError, *YAML_ERRORS) as error:
        raise UserError(
            "broken settings",
            where=CONF,
            got=reason(error),
            expected="the defaults of all settings",
            next_step="restore the files there: `git checkout conf`",
        ) from None


def read_params() -> dict:
    """What params.yaml holds, a mapping with a section `model`. UserError where that is not so."""
    if not PARAMS.exists():
        raise broken("no such file")
    try:
        found = yaml.safe_load(read_bytes(PARAMS).decode())
    except YAML_ERRORS as error:
        raise broken(reason(error)) from None
    if not isinstance(found, dict):
        raise broken("an empty file" if found is None else f"{type(found).__name__} {str(found)[:40]!r}")
    if not isinstance(found.get("model"), dict):
        raise broken("no section `model`")
    return found


def settings() -> DictConfig:
    """params.yaml as the stages take it: as `read_params`, no key but those of conf/, every reference resolved."""
    known = {"model", "engine", *yaml.safe_load(read_text(CONF / "config.yaml"))} - {"defaults"}
    if unknown := sorted(map(str, read_params().keys() - known)):
        raise broken(f"the key {unknown[0]!r}")
    try:
        found = OmegaConf.create(read_text(PARAMS))  # which also refuses a key that comes twice
        OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, *YAML_ERRORS) as error:
        raise broken(reason(error)) from None
    return found

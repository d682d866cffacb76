"""Names of models and adapters: no two sources have one, so that none replaces the other's artifacts. For configure.py."""

from collections.abc import Iterator, Mapping
from itertools import chain, count

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.owner import owner_of, place_of, require_own, same_source
from gptoss_nf4.source.model import safe_model_name
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.reading import read_json_object


def names_of_place(place: str) -> Iterator[str]:
    """Names for what lies at `place`, a path or a repository: its last part, with those before it, with a number."""
    parts = [part for part in place.split("/") if part] or ["model"]
    for first in reversed(range(len(parts))):
        yield safe_model_name("-".join(parts[first:]))
    for number in count(2):
        yield f"{safe_model_name(parts[-1])}-{number}"


def free_name(place: str, origin: dict, reserved: set[str]) -> str:
    """A name for the artifacts of a source, which no other source has. `reserved` are names of models in conf/."""

    def owner(name: str) -> str | None:
        """Who else has `name`."""
        found = owner_of(Artifacts.of(name))
        if found is not None and not same_source(found, origin):
            return place_of(found)
        return "a model of conf/" if name in reserved else None

    first, name = (next(each) for each in (names_of_place(place), (n for n in names_of_place(place) if not owner(n))))
    if name != first:
        print(f"{place} is called {name} here, since {first} is {owner(first)}")
    return name


def require_free_name(name: str, origin: dict, reserved: set[str]) -> None:
    """UserError where `name`, which the user gave, is that of another source."""
    if name in reserved:
        raise UserError(
            "name taken",
            where="model.name",
            got=f"{name} for {place_of(origin)}",
            expected="another name than those of conf/model/",
            next_step="pass another model.name=NAME",
        )
    require_own(Artifacts.of(name), origin)


def free_adapter_name(name: str, place: str, artifacts: Artifacts, others: Mapping) -> str:
    """`name` for the adapter at `place`, or a longer one where another adapter of the same base has it."""
    here = {"kind": "local", "path": place}

    def is_free(each: str) -> bool:
        owner = _owner_of_adapter(each, artifacts) or here
        given = others.get(each) or place
        return same_source(owner, here) and (given["path"] if isinstance(given, Mapping) else given) == place

    return next(each for each in chain((name,), names_of_place(place)) if is_free(each))


def require_own_adapter(name: str, entry: Mapping, artifacts: Artifacts) -> None:
    """UserError where `name` is that of another adapter, which was checked against this base before."""
    owner = _owner_of_adapter(name, artifacts)
    here = {"kind": "hub" if entry["repository"] else "local", "path": entry["path"], "repository": entry["repository"]}
    if owner is not None and not same_source(owner, here):
        raise UserError(
            "name taken",
            where=f"adapters.{name}",
            got=place_of(here),
            expected=f"{place_of(owner)}, as {artifacts.adapter(name)} says",
            next_step=f"choose another name, or delete {artifacts.adapter(name)} to give this one away",
        )


def _owner_of_adapter(name: str, artifacts: Artifacts) -> dict | None:
    description = artifacts.adapter(name)
    return read_json_object(description)["source"] if description.exists() else None

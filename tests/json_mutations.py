"""Values of another type in a JSON document: what hand, a script or another library may have written in their place."""

import json
import random
from typing import Any

# None of these equals another. Each is JSON as Python reads it.
STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    7,
    2**70,
    -(2**70),
    10**4000,
    0.0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "5",
    "\ud800",
    "a\x00\x1b[2J\n",
    "x" * 5000,
    [],
    [[]],
    [None],
    [0, 10.0],
    ["a"],
    [10**4000, 10**4000],
    {},
    {"a": 1},
    {"\udfff": "\ud800"},
)


def places(value: object) -> list[tuple[Any, Any]]:
    """Each (container, key) of a document."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += [(value, key), *places(each)]
    return found


def retyped(document: Any, rng: random.Random) -> Any:
    """A copy of `document` with one value in another type: the same in another form, or a strange one."""
    document = json.loads(json.dumps(document))
    container, key = rng.choice(places(document))
    value = container[key]
    same: list[Any] = [[value], {"value": value}, str(value)]
    if isinstance(value, int):
        same += [float(value), bool(value), -value]
    if isinstance(value, list):
        same += [tuple(map(str, value)), *([float(each) for each in value] for value in [value] if _whole(value))]
        same += [[*value[:-1], float(value[-1])]] if _whole(value) else []
    container[key] = rng.choice(same if rng.random() < 0.5 else STRANGE)
    return json.loads(json.dumps(document))


def _whole(value: list) -> bool:
    return bool(value) and all(type(each) is int for each in value)

"""A plugin of pytest for mutation testing, see pyproject.toml: which tests judge a mutant, and in what order.

mutmut notes the functions that run during a test, and judges their mutants by it. A fixture of many tests runs during the
first of them alone; here what it ran counts for each test that uses it. The quickest test comes first, since the first that
fails ends a mutant. Not seen is what runs in other processes: tests that start some judge only what they run themselves.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutmut.mutation.trampoline import get_mutant_under_test
from mutmut.state import state

STATS = Path("mutmut-stats.json")  # pytest runs in mutants/
CLEAN_TESTS = 20  # run once more without a mutant: all of them have just passed, while mutmut noted what they run
ran_by_fixture: dict[tuple[str, str], set[str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Iterator[None]:
    before = set(state()._stats)
    state()._stats.clear()
    try:
        return (yield)
    finally:
        ran_by_fixture[fixturedef.argname, fixturedef.baseid] = set(state()._stats)
        state()._stats |= before


@pytest.hookimpl(trylast=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    for name, definitions in getattr(item, "_fixtureinfo").name2fixturedefs.items():  # noqa: B009  pytest has no other way
        state()._stats.update(*(ran_by_fixture.get((name, each.baseid), ()) for each in definitions))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = json.loads(STATS.read_text())["duration_by_test"] if STATS.exists() else {}
    if get_mutant_under_test() not in ("stats", "list_all_tests", "fail"):
        items.sort(key=lambda item: seconds.get(item.nodeid, 1.0))
    if get_mutant_under_test() == "" and STATS.exists():
        del items[CLEAN_TESTS:]

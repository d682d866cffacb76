"""Long tables of cases: a few of each run in `make quick`, all of them in `make test`."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters for pytest: each `every`-th of `cases`, the first included, as it is; the others with the slow tests."""

    def slow(case: Any) -> Any:
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

    return [slow(case) if number % every else case for number, case in enumerate(cases)]

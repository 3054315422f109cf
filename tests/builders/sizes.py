"""Which of many sizes of one test are `slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of which only those named run by default: the others repeat it at another size.

    Args:
        quick: Those that run by default; each is a case.
        cases: All of them, in their order.
    """
    cases = list(cases)
    assert all(case in cases for case in quick)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in cases
    ]

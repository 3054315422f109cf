"""What a value from outside must be: its type and range, and one clause that says what is wrong.

For numbers of configs and for the settings of a run. A value that arrives as JSON or from a caller
may be anything: NaN, a string, a list, a number that no float holds.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

_SHOWN = 40  # characters of a value in an error
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Number:
    """A finite number; True and False are none.

    Attributes:
        minimum: Smallest value.
        maximum: Largest value; None if any finite one will do.
        whole: Whether it has to be an integer.
    """

    minimum: float | int
    maximum: float | int | None = None
    whole: bool = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value ("must be a number from 0 to 1: got 2"); None if nothing."""
        if is_number(value, whole=self.whole) and self.minimum <= value:
            limit = math.inf if self.maximum is None else self.maximum
            # An integer that no float holds is compared exactly.
            if value <= limit and (self.whole or _is_finite(value)):
                return None
        kind = "a whole number" if self.whole else "a number"
        ends = f"of at least {_figure(self.minimum)}"
        if self.maximum is not None:
            ends = f"from {_figure(self.minimum)} to {_figure(self.maximum)}"
        return f"must be {kind} {ends}: got {shown(value)}"


@dataclass(frozen=True)
class Flag:
    """True or False, as Python or numpy has them; 0 and 1 are neither."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        if isinstance(value, bool | np.bool_):
            return None
        return f"must be true or false: got {shown(value)}"


@dataclass(frozen=True)
class Choice:
    """One of some strings.

    Attributes:
        names: The strings.
    """

    names: Collection[str]

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        if isinstance(value, str) and value in self.names:
            return None
        return f"must be {' or '.join(map(repr, self.names))}: got {shown(value)}"


@dataclass(frozen=True)
class Shares:
    """Two numbers of 0 to 1 in order: from which share to which."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        try:
            ends = [] if isinstance(value, str | bytes) else list(value)
        except TypeError:
            ends = []
        if len(ends) == 2 and all(map(is_number, ends)) and 0 <= ends[0] <= ends[1] <= 1:
            return None
        return f"is two shares of the steps, of 0 to 1 in order: got {shown(value)}"


@dataclass(frozen=True)
class Name:
    """A short string of letters, digits and underscores."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        if isinstance(value, str) and len(value) < _LONGEST_NAME and value.isidentifier():
            return None
        return f"must be a name: got {shown(value)}"


@dataclass(frozen=True)
class Numbers:
    """A list of numbers.

    Attributes:
        each: Rule of its entries.
    """

    each: Number

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        if not isinstance(value, list | tuple):
            return f"must be a list of numbers: got {shown(value)}"
        return next(filter(None, map(self.each.problem, value)), None)


@dataclass(frozen=True)
class Maybe:
    """Null, or what another rule says.

    Attributes:
        rule: The other rule.
    """

    rule: Number | Flag | Name | Numbers

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        return None if value is None else self.rule.problem(value)


Rule = Number | Flag | Choice | Shares | Name | Numbers | Maybe


def sentence_of(problems: Sequence[str], limit: int) -> str:
    """Problems as one sentence of at most so many characters; of those left out the number."""
    for count in range(len(problems), 0, -1):
        left = f"; and {len(problems) - count} more" if count < len(problems) else ""
        text = "; ".join(problems[:count]) + left
        if len(text) <= limit:
            return text
    return problems[0][: limit - 1] + "…"


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a value is a number of Python's or numpy's: no bool, no array, no string."""
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value in an error: short, and without anything that a terminal would obey."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception:  # an object of any class may be given, also one that cannot be shown
        text = object.__repr__(value)
    text = ascii(text) if isinstance(value, str) or not text.isprintable() else text
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _figure(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"

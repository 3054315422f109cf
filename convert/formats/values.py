"""Rules for single values from configs and callers: their type and range.

The value may be anything: NaN, a string, a list, a number that no float holds. The `problem` of a
rule is one clause that says what is wrong.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from svg_jax.convert.formats.show import show

_SHOWN = 40  # characters of a value in an error message
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Number:
    """A finite number, not True or False.

    Attributes:
        minimum: Smallest value.
        maximum: Largest value; None accepts any finite one.
        whole: Whether the number must be an integer.
    """

    minimum: float | int
    maximum: float | int | None = None
    whole: bool = False

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value ("must be a number from 0 to 1: got 2"), or None."""
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
    """A bool of Python or numpy, not 0 or 1."""

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        import numpy as np  # not above: `svg-jax --help` reads the rules

        if isinstance(value, bool | np.bool_):
            return None
        return f"must be true or false: got {shown(value)}"


@dataclass(frozen=True)
class Choice:
    """One of some strings.

    Attributes:
        names: Strings to choose from.
    """

    names: Collection[str]

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        if isinstance(value, str) and value in self.names:
            return None
        return f"must be {' or '.join(map(repr, self.names))}: got {shown(value)}"


@dataclass(frozen=True)
class Shares:
    """Two numbers from 0 to 1 in ascending order: the ends of a part of the steps."""

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        try:  # an iterator has no length: it would be empty when it is read again
            ends = list(value) if len(value) == 2 and not isinstance(value, str | bytes) else []
        except Exception:  # of a stranger that has no length, or says so in its own way
            ends = []
        if ends and all(map(is_number, ends)) and 0 <= ends[0] <= ends[1] <= 1:
            return None
        return f"is two shares of the steps, of 0 to 1 in order: got {shown(value)}"


@dataclass(frozen=True)
class Name:
    """A short string of letters, digits and underscores."""

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        if isinstance(value, str) and len(value) < _LONGEST_NAME and value.isidentifier():
            return None
        return f"must be a name: got {shown(value)}"


@dataclass(frozen=True)
class Numbers:
    """A list of numbers.

    Attributes:
        each: Rule of every entry.
    """

    each: Number

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        if not isinstance(value, list | tuple):
            return f"must be a list of numbers: got {shown(value)}"
        return next(filter(None, map(self.each.problem, value)), None)


@dataclass(frozen=True)
class Maybe:
    """None, or a value that fits another rule.

    Attributes:
        rule: Rule of a value that is not None.
    """

    rule: Number | Flag | Name | Numbers

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        return None if value is None else self.rule.problem(value)


Rule = Number | Flag | Choice | Shares | Name | Numbers | Maybe


def sentence_of(problems: Sequence[str], limit: int) -> str:
    """Join problems to one sentence of `limit` characters at most, counting those left out."""
    for count in range(len(problems), 0, -1):
        left = f"; and {len(problems) - count} more" if count < len(problems) else ""
        text = "; ".join(problems[:count]) + left
        if len(text) <= limit:
            return text
    return problems[0][: limit - 1] + "…"


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Tell whether a value is a number of Python or numpy that JSON can hold: no bool or array."""
    if isinstance(value, int if whole else int | float):
        return not isinstance(value, bool)
    import numpy as np  # not above: `svg-jax --help` reads the rules

    if type(value) in (np.timedelta64, np.longdouble):
        return False
    return isinstance(value, np.integer if whole else np.integer | np.floating)


def shown(value: Any) -> str:
    """Show a value in an error message, text in quotation marks."""
    return show(value, _SHOWN, quoted=True)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _figure(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"

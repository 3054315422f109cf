"""What a file says as a part of one of our sentences: printable, on one line, and short."""

import reprlib
from collections.abc import Sequence

LIMIT = 80  # characters
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = LIMIT


def show(value: object, limit: int = LIMIT) -> str:
    """Return a foreign value as printable text of one line.

    Args:
        value: The value: text stays as it is but for what a terminal would take for a command or
            cannot print, which is escaped; of anything else, a short form is shown.
        limit: The most characters of the result.
    """
    text = value[: limit + 1] if isinstance(value, str) else _VALUES.repr(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def show_some(values: Sequence[str], count: int = 3, limit: int = 60) -> str:
    """Return the first of many names, and how many more there are."""
    named = ", ".join(show(value, limit) for value in values[:count])
    return named + (f", and {len(values) - count} more" if len(values) > count else "")

"""Foreign values inside error messages: printable, on one line, and short."""

import reprlib
from collections.abc import Sequence

LIMIT = 80  # characters
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = LIMIT


def show(value: object, limit: int = LIMIT, *, quoted: bool = False) -> str:
    """Return a foreign value as printable text of one line.

    Args:
        value: Text, of which characters that a terminal cannot print or would obey are escaped; or
            any object, of which a short form is shown.
        limit: Largest number of characters of the result.
        quoted: Whether text is put in quotation marks.
    """
    if isinstance(value, str) and not quoted:
        text = value[: limit + 1]
    else:
        try:
            text = _VALUES.repr(value)
        except ValueError:  # an integer of more digits than Python prints
            text = object.__repr__(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def show_some(values: Sequence[str], count: int = 3, limit: int = 60) -> str:
    """Return the first `count` of some names, and the number of the others."""
    named = ", ".join(show(value, limit) for value in values[:count])
    return named + (f", and {len(values) - count} more" if len(values) > count else "")

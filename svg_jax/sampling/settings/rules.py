"""What a setting's value must be, where it is no plain number: texts, arrays, objects, files.

No module here imports jax or numpy before it checks a value: `svg-jax --help` reads the settings.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from svg_jax.convert.formats.values import Rule as PlainRule
from svg_jax.convert.formats.values import shown


@dataclass(frozen=True)
class Prompts:
    """One text, or a list with one for each video."""

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            return f"must be a string or a list of strings: got {shown(value)}"
        if not texts:
            return "is an empty list: pass at least one prompt"
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return f"is no Unicode text: character {error.start} is half of a pair (surrogate)"
        return None


@dataclass(frozen=True)
class ArrayOf:
    """An array.

    Attributes:
        axes: Names of its axes.
        kinds: Kinds that its elements may be of: "float", "int", "bool".
        also: Other numbers of axes that it may have.
    """

    axes: tuple[str, ...]
    kinds: tuple[str, ...] = ("float",)
    also: tuple[int, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing."""
        import jax
        import numpy as np

        if not isinstance(value, np.ndarray | jax.Array):
            return f"must be an array: got {type(value).__name__}"
        kind = _kind(value.dtype)
        if kind not in self.kinds:
            return f"must be an array of {' or '.join(self.kinds)}: got {value.dtype}"
        ranks = len(self.axes), *self.also
        if value.ndim not in ranks:
            axes = " or ".join(map(str, sorted(ranks)))
            return f"must have {axes} axes: got the shape {value.shape}"
        if not value.size:
            return f"is empty: got the shape {value.shape}"
        if kind == "float" and not _all_finite(value):
            return "has values that are not finite in float32"
        return None


@dataclass(frozen=True)
class Images:
    """One image for all prompts, or a list of one for each; they are read by `svg_jax.media`."""

    def problem(self, value: Any) -> str | None:
        """Say nothing: what is wrong is said when they are read."""
        del value
        return None


@dataclass(frozen=True)
class FilePath:
    """A path of a file."""

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing."""
        if isinstance(value, str | os.PathLike):
            return None
        return f"must be a path: got {shown(value)}"


@dataclass(frozen=True)
class Kind:
    """An object of some class.

    Attributes:
        fits: Whether a value is one.
        name: What it is.
    """

    fits: Callable[[Any], bool]
    name: str

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing."""
        return None if self.fits(value) else f"must be {self.name}: got {shown(value)}"


Rule = PlainRule | Prompts | ArrayOf | Images | FilePath | Kind


def as_array(value: Any) -> Any:
    """Take another library's array as numpy's; what is none stays as it is."""
    import jax
    import numpy as np

    from svg_jax.media.pixels import as_numpy

    if value is None or isinstance(value, np.ndarray | jax.Array | list | tuple | np.generic):
        return value
    if not hasattr(value, "__array__"):
        return value
    try:
        return as_numpy(value, "value")
    except ValueError:  # which its rule says
        return value


def is_hashable(value: Any) -> bool:
    """Tell whether a value has a hash."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _kind(dtype: Any) -> str:
    import jax.numpy as jnp

    for kind, of in (("float", jnp.floating), ("int", jnp.integer), ("bool", jnp.bool_)):
        if jnp.issubdtype(dtype, of):
            return kind
    return "other"


def _all_finite(array: Any) -> bool:
    """Tell whether all elements are finite, also when they have become float32."""
    import ml_dtypes
    import numpy as np

    values = np.asarray(array)
    if values.dtype != ml_dtypes.bfloat16 and values.dtype.kind == "f":
        low, high = values.min(), values.max()  # NaN comes out of either
        limit = float(np.finfo(np.float32).max)
        return bool(np.isfinite([low, high]).all() and max(-low, high) <= limit)
    return bool(np.isfinite(values.astype(np.float32)).all())

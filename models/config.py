"""Reading a released config.json strictly: nothing unknown, mistyped or unimplemented gets by."""

import contextlib
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")

# What transformers notes in the config.json of any model, of no consequence for what it computes.
TRANSFORMERS_NOTES = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "initializer_factor",
        "initializer_range",
        "pad_token_id",
        "tie_word_embeddings",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def read_config(
    config: type[Config],
    values: Mapping[str, Any],
    *,
    ignored: Collection[str] = (),
    only: Mapping[str, Any] = types.MappingProxyType({}),
) -> Config:
    """Makes a config dataclass from a parsed config.json.

    Args:
        config: The dataclass; its field names are the file's keys.
        values: The parsed file. Keys that begin with "_" are the writing library's notes to itself.
        ignored: Keys that say nothing about what the model computes.
        only: Keys that are no fields, with the value that they must have where they stand: they
            tell other models.

    Raises:
        ValueError: On unknown keys or values of another type than the field's.
    """
    for name in only.keys() & values.keys():
        if values[name] != only[name]:
            raise ValueError(
                f"{config.__name__}: {name}={values[name]!r} is not implemented, only "
                f"{only[name]!r}."
            )
    kinds = typing.get_type_hints(config)
    passed_over = {*ignored, *only}
    values = {k: v for k, v in values.items() if not k.startswith("_") and k not in passed_over}
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(
            f"{config.__name__}: unknown keys {unknown}; this is the config of another model "
            "or of a newer version than the one implemented."
        )
    for name, value in values.items():
        try:
            values[name] = _typed(value, kinds[name])
        except TypeError:
            raise ValueError(f"{config.__name__}: {name} cannot be {value!r}.") from None
    return config(**values)


def _typed(value: Any, kind: Any) -> Any:
    """The value as one of its field's type; TypeError where JSON's is another."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and type(value) in (list, tuple):
        endless = parts[-1] is Ellipsis
        kinds = [parts[0]] * len(value) if endless else parts
        if len(kinds) != len(value):
            raise TypeError
        return tuple(_typed(part, kind) for part, kind in zip(value, kinds, strict=True))
    if isinstance(kind, types.UnionType):
        for part in parts:
            with contextlib.suppress(TypeError):
                return _typed(value, part)
        raise TypeError
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def check_config(config: Any, only: Mapping[str, Any]) -> None:
    """Refuses what no model has and what is not implemented.

    Args:
        config: A config dataclass.
        only: Fields of which a single value is implemented, with that value.

    Raises:
        ValueError: On another value than that, or sizes below one.
    """
    name = type(config).__name__
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in only:
            if value != only[field.name]:
                raise ValueError(
                    f"{name}: {field.name}={value!r} is not implemented, only {only[field.name]!r}."
                )
        elif any(type(size) is int and size < 1 for size in _sizes(value)):
            raise ValueError(f"{name}: {field.name} must be at least 1, not {value}.")


def _sizes(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)

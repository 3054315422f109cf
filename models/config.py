"""Reading a released config.json strictly: nothing unknown, mistyped or unimplemented gets by."""

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def read_config(
    config: type[Config], values: Mapping[str, Any], *, ignored: Collection[str] = ()
) -> Config:
    """Makes a config dataclass from a parsed config.json.

    Args:
        config: The dataclass; its field names are the file's keys.
        values: The parsed file. Keys that begin with "_" are the writing library's notes to itself.
        ignored: Keys that say nothing about what the model computes.

    Raises:
        ValueError: On unknown keys or values of another type than the field's.
    """
    types = typing.get_type_hints(config)
    values = {k: v for k, v in values.items() if not k.startswith("_") and k not in ignored}
    if unknown := sorted(values.keys() - types.keys()):
        raise ValueError(
            f"{config.__name__}: unknown keys {unknown}; this is the config of another model "
            "or of a newer version than the one implemented."
        )
    for name, value in values.items():
        kind, parts = types[name], typing.get_args(types[name])
        if typing.get_origin(kind) is tuple:
            fits = type(value) in (list, tuple) and tuple(map(type, value)) == parts
            values[name] = tuple(value) if fits else value
        elif kind is float and type(value) is int:
            fits, values[name] = True, float(value)
        else:
            fits = type(value) in (parts or (kind,))
        if not fits:
            raise ValueError(f"{config.__name__}: {name} cannot be {value!r}.")
    return config(**values)


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

"""Reading a config.json: every value has its field's type, and lists become tuples."""

from dataclasses import dataclass

import pytest

from svg_jax.models.config import read_config


@dataclass(frozen=True)
class Config:
    size: tuple[int, int] = (1, 2)
    widths: tuple[int, ...] = (8,)
    rate: float = 1.0
    means: tuple[float, ...] | None = None


def test_lists_become_tuples_of_the_fields_types():
    read = read_config(Config, {"size": [3, 4], "widths": [1, 2, 3], "rate": 2, "means": [0, 0.5]})
    assert read == Config((3, 4), (1, 2, 3), 2.0, (0.0, 0.5))
    assert read_config(Config, {"widths": [], "means": None, "_class_name": "Any"}) == Config(
        widths=()
    )


@pytest.mark.parametrize(
    "values",
    [{"size": [1]}, {"size": [1, 2.0]}, {"widths": 3}, {"widths": [True]}, {"means": ["a"]}],
)
def test_a_value_of_another_type_is_refused_by_name(values):
    with pytest.raises(ValueError, match=f"Config: {next(iter(values))} cannot be"):
        read_config(Config, values)

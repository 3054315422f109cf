"""Reading a config.json: every value has its field's type, and lists become tuples."""

from dataclasses import dataclass

import pytest

from svg_jax.convert.components import passed_over
from svg_jax.convert.tables.registry import MODEL_CLASSES
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


# LLaVA's config has two of its own, and needs them.
CLASSES = sorted(MODEL_CLASSES.keys() - {"LlavaForConditionalGeneration"})
HARMLESS = {
    "_name_or_path": "runs/3",
    "_use_default_values": ["eps"],
    "transformers_version": "4.40",
    "torch_dtype": "bfloat16",
    "quantization_config": None,
    "gradient_checkpointing": True,
    "use_cache": True,
    "attention_dropout": 0.1,
    "dropout": 0.1,
    "hidden_dropout_prob": 0.5,
    "tie_word_embeddings": False,
    "id2label": {"0": "LABEL_0"},
    "num_beams": 4,
    "pruned_heads": {},
    "add_cross_attention": False,
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_changes_nothing_that_a_model_computes_is_passed_over_and_named(name):
    model_class = MODEL_CLASSES[name]
    plain, noted = (model_class.read_config(values).to_dict() for values in ({}, HARMLESS))
    plain |= {"dropout": noted["dropout"]} if "dropout" in plain else {}
    assert noted == plain
    assert {"use_cache", "_name_or_path"} <= set(passed_over(name, HARMLESS))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("pruned_heads", {"0": [1]}),
        ("add_cross_attention", True),
        ("a_new_norm", None),
        ("scale_factor_of_rope", 2.0),
        ("\x1b[31m" * 1000, 1),
    ],
)
def test_what_may_change_it_is_refused_in_one_sentence(name, key, value):
    with pytest.raises(ValueError, match=r"unknown keys|is not implemented, only") as found:
        MODEL_CLASSES[name].read_config({key: value})
    assert str(found.value).isprintable()
    assert len(str(found.value)) < 400

"""Conversion rules: what a table of them asks for, and that the way back is the inverse."""

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg_jax.convert import ConversionError, Rule, convert_state, match_rules, restore_state
from svg_jax.convert.tables.rules import stack_rules

LINEAR = Rule("layers.{layer}.to_q.weight", "blocks.query.kernel", "transpose", (3, 2), layers=2)
NORM = Rule("norm.weight", "norm.scale", "none", (2,))
RULES = (LINEAR, NORM)


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "layers.0.to_q.weight": random.normal(size=(3, 2)).astype(np.float32),
        "layers.1.to_q.weight": random.normal(size=(3, 2)).astype(np.float32),
        "norm.weight": random.normal(size=(2,)).astype(np.float32),
    }


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_inverse_gives_back_every_bit(shape, dtype, seed):
    bits = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    tensor = np.frombuffer(bits, dtype).reshape(shape)
    for transform in ("none", "flatten", "transpose", "patch", "conv"):
        two_axes, more = transform == "transpose", transform in ("patch", "conv")
        if (two_axes and len(shape) != 2) or (more and len(shape) < 3):
            continue
        rule = Rule("a", "a", transform, shape)
        leaf = rule.forward(tensor)
        assert leaf.shape == rule.target_shape
        assert rule.inverse(leaf).tobytes() == tensor.tobytes()


def test_a_linear_weight_multiplies_from_the_right():
    weight, x = np.arange(6.0).reshape(3, 2), np.array([1.0, 10.0])
    np.testing.assert_array_equal(x @ LINEAR.forward(weight), weight @ x)


def test_a_convolution_multiplies_patches_with_the_channel_slowest():
    weight = np.random.default_rng(0).normal(size=(5, 3, 2, 4))
    patch = np.random.default_rng(1).normal(size=(3, 2, 4))
    kernel = Rule("a", "a", "patch", (5, 3, 2, 4)).forward(weight)
    np.testing.assert_allclose(
        patch.reshape(-1) @ kernel, np.einsum("oijk,ijk->o", weight, patch), rtol=1e-12
    )


def test_a_convolution_has_its_kernel_first_and_its_outputs_last():
    weight = np.random.default_rng(0).normal(size=(5, 3, 2, 4))
    kernel = Rule("a", "a", "conv", (5, 3, 2, 4)).forward(weight)
    np.testing.assert_array_equal(kernel, np.einsum("oijk->jkio", weight))


def test_layers_are_stacked_in_order():
    tensors = random_tensors()
    tree = convert_state(tensors, RULES)
    assert tree["norm"]["scale"].tobytes() == tensors["norm.weight"].tobytes()
    for layer in range(2):
        expected = tensors[f"layers.{layer}.to_q.weight"].T
        np.testing.assert_array_equal(tree["blocks"]["query"]["kernel"][layer], expected)


def test_stacks_may_differ_in_their_numbers_of_layers():
    layer = [Rule("to_q.weight", "query.kernel", "transpose", (3, 2))]
    rules = stack_rules("layers", "blocks", 2, layer) + stack_rules(
        "more.layers", "others", 1, layer
    )
    assert rules[0] == LINEAR
    tensors = random_tensors()
    del tensors["norm.weight"]
    tensors["more.layers.0.to_q.weight"] = np.arange(6.0).reshape(3, 2)
    tree = convert_state(tensors, rules)
    assert tree["blocks"]["query"]["kernel"].shape == (2, 2, 3)
    assert tree["others"]["query"]["kernel"].shape == (1, 2, 3)
    restored = restore_state(tree, rules)
    assert restored.keys() == tensors.keys()
    assert all(restored[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_restore_state_undoes_convert_state():
    tensors = random_tensors()
    restored = restore_state(convert_state(tensors, RULES), RULES)
    assert restored.keys() == tensors.keys()
    assert all(restored[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_one_error_names_every_kind_of_misfit():
    shapes = {
        "layers.0.to_q.weight": (2, 3),
        "layers.2.to_q.weight": (3, 2),
        "extra": (1,),
        "norm.weight": (2,),
    }
    with pytest.raises(ConversionError) as caught:
        match_rules(shapes, RULES, where="transformer")
    assert str(caught.value) == (
        "transformer: the tensors do not fit the config: 1 missing (layers.1.to_q.weight); "
        "2 unexpected (extra, layers.2.to_q.weight); 1 misshapen (layers.0.to_q.weight is [2, 3] "
        "and must be [3, 2]). Check that config.json belongs to these weights."
    )


def test_long_lists_are_counted_and_cut():
    with pytest.raises(ConversionError, match=r"41 missing .*layers.4.*, and 36 more\)"):
        match_rules({}, (dataclasses.replace(LINEAR, layers=40), NORM))


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (Rule("norm.weight", "other", "none", (2,)), "1 claimed by two rules (norm.weight)"),
        (Rule("norm.bias", "norm.scale", "none", (2,)), "1 made by two rules (norm.scale)"),
    ],
)
def test_a_table_cannot_say_a_thing_twice(second, complaint):
    shapes = {"norm.weight": (2,)} | {second.source: (2,)}
    with pytest.raises(ConversionError, match=re.escape(complaint)):
        match_rules(shapes, (NORM, second))


class TestTiedWeights:
    rule = Rule("shared", "embedding", "none", (2,), aliases=("embed_tokens",))
    one, other = np.array([1.0, 2.0]), np.array([1.0, -2.0])

    @pytest.mark.parametrize("names", [["shared"], ["embed_tokens"], ["shared", "embed_tokens"]])
    def test_any_of_the_names_will_do(self, names):
        tree = convert_state(dict.fromkeys(names, self.one), (self.rule,))
        np.testing.assert_array_equal(tree["embedding"], self.one)

    def test_none_of_them_will_not(self):
        with pytest.raises(ConversionError, match=r"1 missing \(shared\)"):
            convert_state({}, (self.rule,))

    def test_they_must_be_equal(self):
        with pytest.raises(ConversionError, match="shared and embed_tokens must be the same"):
            convert_state({"shared": self.one, "embed_tokens": self.other}, (self.rule,))


@pytest.mark.parametrize(
    ("source", "transform", "shape", "more"),
    [
        ("a", "transpose", (2,), {}),
        ("a", "conv", (2, 3), {}),
        ("a", "none", (2,), {"aliases": ("b.{layer}",)}),
        ("a", "none", (2,), {"layers": 2}),
        ("a.{layer}", "none", (2,), {}),
        ("a.{layer}", "none", (2,), {"aliases": ("b",), "layers": 2}),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(source, transform, shape, more):
    with pytest.raises(ValueError, match=f"{re.escape(source)}: "):
        Rule(source, "a", transform, shape, **more)

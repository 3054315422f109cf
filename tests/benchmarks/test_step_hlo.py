"""The digest of a program: equal where it computes the same, another where it does not."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import step_hlo

X = jax.ShapeDtypeStruct((3,), jnp.float32)


def scan(body):
    return lambda x, y: jax.lax.scan(lambda carry, _: (body(carry, y), None), x, length=4)[0]


def same_in_other_words(x, y):
    unused = jnp.exp(x)
    doubled = jax.jit(lambda z: z + z)(y)
    del unused
    return jnp.sin(x) * doubled


def test_order_names_calls_and_dead_code_do_not_count():
    def plain(x, y):
        sine = jnp.sin(x)
        return sine * (y + y)

    assert step_hlo.digest_of(plain, X, X) == step_hlo.digest_of(same_in_other_words, X, X)


def test_a_choice_by_platform_is_what_it_chooses():
    def chosen(x, y):
        return jax.lax.platform_dependent(x, y, cpu=same_in_other_words, default=jnp.add)

    expected = same_in_other_words if jax.default_backend() == "cpu" else jnp.add
    assert step_hlo.digest_of(chosen, X, X) == step_hlo.digest_of(expected, X, X)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: jnp.sin(y) * (x + x),
        lambda x, y: jnp.cos(x) * (y + y),
        lambda x, y: jnp.sin(x) * (y + y) + 0.0,
        lambda x, y: (jnp.sin(x) * (y + y)).astype(jnp.bfloat16),
        lambda x, y: jnp.sin(x) * (y * 2.0),
    ],
)
def test_another_operation_input_constant_or_dtype_does(other):
    assert step_hlo.digest_of(other, X, X) != step_hlo.digest_of(same_in_other_words, X, X)


def test_what_a_loop_does_counts():
    digests = {step_hlo.digest_of(scan(body), X, X) for body in (jnp.add, jnp.multiply, jnp.add)}
    assert len(digests) == 2


def test_a_changed_step_of_the_bundled_model_is_told_from_an_unchanged_one():
    step, inputs = step_hlo.step_of(step_hlo.TINY, sparse=False, guided=True)
    again, _ = step_hlo.step_of(step_hlo.TINY, sparse=False, guided=True)

    def changed(inputs):
        return step({**inputs, "scale": inputs["scale"] + 1})

    digest = step_hlo.digest_of(step, inputs)
    assert step_hlo.digest_of(again, inputs) == digest
    assert step_hlo.digest_of(changed, inputs) != digest

"""What attention cannot take is refused in one sentence, with the axes that it expects.

Users run without the annotations' checks that tests run with, so these are off here.
"""

import copy
import dataclasses
import pickle
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from svg_jax import (
    SparsityConfig,
    StepState,
    VideoLayout,
    Warmup,
    attend_dense,
    attend_sparse,
    classify_heads,
    models,
    sparse_attention,
)
from svg_jax.config import dense_step_count
from svg_jax.kernels import block_list_attention, block_sparse_attention, dense_attention
from svg_jax.masks import sparse_mask
from svg_jax.models.attention import cross_attention

LAYOUT = VideoLayout(num_frames=3, tokens_per_frame=8, text_tokens=6)
WAN = VideoLayout(num_frames=3, tokens_per_frame=10)
CONFIG = SparsityConfig(density=0.6, sampled_rows=4, band_multiple=1)
QKV = np.random.default_rng(0).standard_normal((3, 2, 30, 4, 16), np.float32)
RNG = jax.random.key(0)


@pytest.fixture(autouse=True)
def as_users_run():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def in_a_model(query, key, value, *, layout=LAYOUT, text_length=None, rng=RNG, labels=None):
    """A layer's call of attend_sparse, labels for a model of three layers."""
    return attend_sparse(CONFIG, 3)(
        query,
        key,
        value,
        layout=layout,
        text_length=text_length,
        layer=jnp.int32(1),
        step_state=StepState(rng, labels),
    )


def dense_in_a_model(query, key, value, *, layout=LAYOUT, text_length=None):
    return attend_dense(
        query,
        key,
        value,
        layout=layout,
        text_length=text_length,
        layer=jnp.int32(0),
        step_state=None,
    )


SPARSE: dict[str, Any] = {
    "sparse_attention": partial(sparse_attention, layout=LAYOUT, config=CONFIG, rng=RNG),
    "classify_heads": partial(classify_heads, layout=LAYOUT, config=CONFIG, rng=RNG),
    "attend_sparse": in_a_model,
}
OF_VIDEOS: dict[str, Any] = SPARSE | {
    "attend_dense": dense_in_a_model,
    "models.dense_attention": partial(models.dense_attention, layout=LAYOUT),
}
ALL = OF_VIDEOS | {
    "cross_attention": cross_attention,
    "block_sparse_attention": partial(block_sparse_attention, masks=sparse_mask(LAYOUT, CONFIG)),
    "dense_attention": dense_attention,
}


def assert_refused(call, *says):
    with pytest.raises(ValueError, match=re.escape(says[0])) as error:
        call()
    message = str(error.value)
    assert len(message) <= 500
    assert "\n" not in message
    for what in says:
        assert what in message


@pytest.mark.parametrize("name", ALL)
def test_arrays_that_do_not_fit_are_refused_with_the_expected_axes(name):
    call, (query, key, value) = ALL[name], QKV
    axes = "[batch, tokens, heads, head_dim]"
    refused = partial(assert_refused)
    refused(lambda: call(query[0], key[0], value[0]), "query must be", axes, "[30, 4, 16]", "[None")
    refused(lambda: call(query, key[..., 0, 0], value), "key must be", axes)
    refused(lambda: call(query.tolist(), key, value), "query must be an array", axes, "list")
    refused(lambda: call(query, key[:, :, :2], value[:, :, :2]), "grouped heads", "jnp.repeat(key")
    refused(lambda: call(query, key, value[..., :8]), "value has a head_dim of 8", axes)
    refused(lambda: call(query, key[..., :8], value[..., :8]), "must agree", axes)
    refused(lambda: call(query[:1], key, value), "must agree in batch", axes)
    refused(lambda: call(query, key, value[:, :9]), "key and value differ in shape", axes)
    refused(lambda: call(query, key.astype(np.float16), value), "share one dtype", "float16")
    for dtype in (np.int32, np.complex64, jnp.float8_e4m3fn):
        refused(lambda dtype=dtype: call(*QKV.astype(dtype)), "attention takes float32", "cast")
    refused(lambda: call(*QKV[:, :0]), "attention over nothing")


@pytest.mark.parametrize("name", OF_VIDEOS)
def test_arrays_layouts_and_lengths_of_text_must_fit_each_other(name):
    call = OF_VIDEOS[name]
    refused = partial(assert_refused)
    refused(lambda: call(*QKV[:, :, :29]), "29 tokens", "VideoLayout(", "has 30")
    refused(lambda: call(*QKV.swapaxes(2, 3)), "4 tokens", "query.swapaxes(1, 2)")
    refused(lambda: call(QKV[0], *QKV[1:, :, :29]), "key [2, 29, 4, 16] has 29 tokens")
    refused(lambda: call(*QKV, layout=(3, 8, 6)), "layout must be a VideoLayout, not tuple")
    for length in ([5, 5], 5, np.array(5), np.array([5.0, 5.0]), jnp.zeros((2, 1), jnp.int32)):
        say = "text_length must be integers [batch] of shape (2,)"
        refused(lambda length=length: call(*QKV, text_length=length), say)
    for length, found in (([-1, 5], "-1 … 5"), ([5, 7], "5 … 7")):
        length = np.array(length)
        refused(lambda length=length: call(*QKV, text_length=length), "between 0 and 6", found)
    refused(lambda: call(*QKV, layout=WAN, text_length=np.array([1, 1])), "no text", "None")


@pytest.mark.parametrize(
    ("name", "dtype"), [("sparse_attention", jnp.int32), ("attend_dense", jnp.int8)]
)
def test_lengths_out_of_range_are_clamped_under_a_trace_and_any_integers_will_do(name, dtype):
    attend = jax.jit(lambda length: OF_VIDEOS[name](*QKV, text_length=length))
    actual, expected = (
        jax.tree.leaves(attend(jnp.array(length, dtype))) for length in ([-3, 99], [0, 6])
    )
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", SPARSE)
def test_keys_are_typed_or_raw_and_nothing_else(name):
    call = SPARSE[name]
    typed, raw = (call(*QKV, rng=key) for key in (RNG, jax.random.PRNGKey(0)))
    for a, b in zip(jax.tree.leaves(typed), jax.tree.leaves(raw), strict=True):
        np.testing.assert_array_equal(a, b)
    wrong = (0, "seed", jax.random.split(RNG), jnp.zeros(2), jnp.zeros((3,), jnp.uint32))
    for key in (*wrong, np.random.default_rng(0)):
        assert_refused(lambda key=key: call(*QKV, rng=key), "rng must be one PRNG key")


def test_labels_and_settings_of_another_kind():
    refused = partial(assert_refused)
    for labels in (np.zeros((2, 4), int), np.zeros((4, 2), bool), [[True] * 4] * 2):
        say = "labels must be booleans [batch, heads] of shape (2, 4)"
        refused(lambda labels=labels: SPARSE["sparse_attention"](*QKV, labels=labels), say)
    say = "labels must be booleans [layers, batch, heads] of shape (3, 2, 4)"
    for labels in (np.zeros((2, 2, 4), bool), np.zeros((2, 4), bool), np.zeros((3, 2, 4), int)):
        refused(lambda labels=labels: in_a_model(*QKV, labels=labels), say)
    make: Any = attend_sparse
    attend = partial(make(CONFIG, 3), *QKV, layout=LAYOUT, text_length=None, layer=0)
    refused(lambda: attend(step_state=None), "takes a StepState", "NoneType")
    refused(lambda: make(0.5, 3), "config must be a SparsityConfig, not float")
    refused(lambda: make(CONFIG, 3, warmup=0.2), "warmup must be a Warmup, not float")
    for layers in (0, 2.5, True):
        refused(lambda layers=layers: make(CONFIG, layers), "num_layers")
    call = SPARSE["sparse_attention"]
    refused(lambda: call(*QKV, config={"density": 0.5}), "config must be a SparsityConfig, not d")
    for name in ("sparse_attention", "classify_heads"):
        refused(lambda name=name: SPARSE[name](*QKV, config=None), "config must be a SparsityC")
    refused(lambda: call(*QKV, implementation="cuda"), "implementation is None")
    for scale in (0, -1.0, np.nan, np.inf, "1", True):
        refused(lambda scale=scale: dense_attention(*QKV, scale=scale), "scale must be")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_numbers_of_blocks_are_checked_or_not_listed(implementation):
    shape = (2, 4, 1)
    counts, blocks = np.ones(shape, np.int32), np.zeros((*shape, 2), np.int32)
    attend = partial(block_list_attention, *QKV, implementation=implementation)
    for wrong in (-1, 1, 2**31 - 1):
        assert_refused(
            lambda wrong=wrong: attend(counts=counts, blocks=blocks + wrong), "blocks lies between"
        )
    for wrong in (-1, 3):
        assert_refused(lambda wrong=wrong: attend(counts=counts * wrong, blocks=blocks), "counts")
    assert_refused(lambda: attend(counts=counts, blocks=blocks[0]), "blocks must be integers")
    assert_refused(lambda: attend(counts=[1], blocks=blocks), "counts must be integers")
    attend(counts=counts, blocks=blocks + np.array([0, 77], np.int32))  # 77 is not counted

    traced = jax.jit(lambda counts, blocks: attend(counts=counts, blocks=blocks))
    both = blocks + np.array([9, 0], np.int32)  # of two listed blocks one does not exist
    np.testing.assert_array_equal(
        traced(2 * counts, both)[0], attend(counts=counts, blocks=blocks)[0]
    )
    np.testing.assert_array_equal(traced(-counts, blocks)[0], 0)


@pytest.mark.parametrize(
    ("make", "field"),
    [(SparsityConfig, "density"), (Warmup, "steps"), (Warmup, "layers")],
)
@pytest.mark.parametrize(
    "share", [1.5, -0.1, np.nan, np.inf, "0.5", True, None, [0.5], 1j, 10**4000, "x" * 1000]
)
def test_shares_are_numbers_up_to_1(make, field, share):
    assert_refused(lambda: make(**{field: share}), field)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"dense_steps": 0.3}, "dense_steps is no field of SparsityConfig: pass .*(steps=0.3)"),
        ({"dense_steps": 0.2, "dense_layers": 0}, "are no fields .*Warmup(steps=0.2, layers=0)"),
    ],
)
def test_the_warm_up_that_was_in_the_sparsity_is_refused_in_its_new_words(old, new):
    match = new.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(TypeError, match=match):
        SparsityConfig(density=0.3, **old)
    with pytest.raises(TypeError, match=match):
        dataclasses.replace(CONFIG, **old)


def test_a_sparsity_is_copied_pickled_and_replaced():
    for copied in (copy.deepcopy(CONFIG), pickle.loads(pickle.dumps(CONFIG))):
        assert copied == CONFIG
    assert dataclasses.replace(CONFIG, density=1).sampled_rows == CONFIG.sampled_rows
    with pytest.raises(TypeError, match="densty"):
        SparsityConfig(densty=0.3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("field", ["num_frames", "tokens_per_frame", "text_tokens"])
@pytest.mark.parametrize("count", [-1, 2.0, np.nan, "4", True, None, np.array([4]), 1j])
def test_a_layout_has_whole_numbers_of_tokens(field, count):
    counts: dict[str, Any] = {"num_frames": 3, "tokens_per_frame": 8, "text_tokens": 6}
    wrong: dict[str, Any] = counts | {field: count}
    assert_refused(lambda: VideoLayout(**wrong), field)
    same: dict[str, Any] = counts | {field: np.int64(7)}
    seven: dict[str, Any] = counts | {field: 7}
    assert hash(VideoLayout(**same)) == hash(VideoLayout(**seven))


@pytest.mark.parametrize("field", ["band_rounding", "first_frame_sink"])
@pytest.mark.parametrize("value", ["sideways", 1, 0.5, np.nan, "x" * 1000])
def test_a_layouts_rule_is_one_that_there_is(field, value):
    wrong: dict[str, Any] = {field: value}
    assert_refused(lambda: VideoLayout(3, 8, **wrong), field)


@pytest.mark.parametrize("field", ["sampled_rows", "band_multiple"])
@pytest.mark.parametrize("count", [0, -1, 1.5, 64.0, np.nan, "64", True, None])
def test_counts_are_whole_numbers_from_1(field, count):
    with pytest.raises(ValueError, match=field):
        SparsityConfig(**{field: count})


def test_density_is_over_0_and_the_sink_a_choice():
    with pytest.raises(ValueError, match="density"):
        SparsityConfig(density=0)
    with pytest.raises(ValueError, match="first_frame_sink"):
        SparsityConfig(first_frame_sink="yes")  # pyright: ignore[reportArgumentType]


def test_numpy_numbers_are_numbers():
    numbers: Any = (np.float32(0.5), np.int64(8), None, np.int32(4))
    config = SparsityConfig(*numbers)
    assert sparse_mask(WAN, config) == sparse_mask(WAN, SparsityConfig(0.5, 8, None, 4))
    shares: Any = (np.float32(0.5), np.float64(0))
    assert dense_step_count(Warmup(*shares), 4) == 2

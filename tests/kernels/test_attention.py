"""Every implementation of the kernels' contract against a float64 reference."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import slow_but

from svg_jax.kernels import (
    BandMask,
    block_list_attention,
    block_sparse_attention,
    dense_attention,
    sampled_attention,
    sparse_attention_pays,
)
from svg_jax.kernels.cudnn import cudnn_attention

IMPLEMENTATIONS = ["xla", "reference"]
# Text first, text last and padded, a sink; odd lengths, a band of one, a band of everything.
CASES = {
    "CogVideoX": (BandMask(613, 100, text_start=0, text_tokens=17), 64, None),
    "HunyuanVideo": (BandMask(549, 77, text_start=520, text_tokens=29), 128, [29, 4]),
    "no real text": (BandMask(549, 77, text_start=520, text_tokens=29), 32, [0, 29]),
    "Wan": (BandMask(701, 129, sink_tokens=90), 48, None),
    "narrow": (BandMask(300, 1), 256, None),
    "everything": (BandMask(257, 257, text_start=0, text_tokens=5), 40, None),
    "one token": (BandMask(1, 1), 32, None),
    "text alone": (BandMask(19, 1, text_tokens=19), 32, [19, 7]),
    "text and sink": (BandMask(400, 60, text_start=0, text_tokens=30, sink_tokens=75), 32, [30, 1]),
}


# Compute capability of the fake GPU, head_dim, dtype, and whether sparse attention is faster.
DEVICES = [
    ("cpu", "", 128, jnp.bfloat16, True),
    ("tpu", "", 128, jnp.bfloat16, True),
    ("gpu", "9.0", 128, jnp.bfloat16, True),
    ("gpu", "9.0", 96, jnp.bfloat16, False),  # which the Hopper kernel does not take
    ("gpu", "9.0", 128, jnp.float32, True),  # which cuDNN does not take either
    ("gpu", "8.0", 128, jnp.bfloat16, False),
    ("gpu", "12.0", 64, jnp.float16, False),
    ("gpu", "8.0", 64, jnp.float32, True),
]


@pytest.mark.parametrize(("backend", "capability", "head_dim", "dtype", "pays"), DEVICES)
def test_sparse_attention_pays_unless_cudnn_is_faster(
    backend, capability, head_dim, dtype, pays, monkeypatch
):
    device = SimpleNamespace(compute_capability=capability, device_kind="a device")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert sparse_attention_pays(head_dim, dtype) == pays


def random_qkv(tokens, head_dim, seed=0, batch=2, heads=2):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(1.5 * rng.standard_normal((batch, tokens, heads, head_dim)), jnp.float32)
        for _ in range(3)
    )


def exact(qkv, keep):
    """Softmax attention in float64 under keep [batch, heads, S, S]: output and log-sum-exp."""
    query, key, value = (np.asarray(x, np.float64).swapaxes(1, 2) for x in qkv)
    logits = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    with np.errstate(divide="ignore"):
        weights = np.where(keep, np.exp(logits), 0.0)
        total = weights.sum(-1, keepdims=True)
        out = weights / np.where(total > 0, total, 1) @ value
        return out.swapaxes(1, 2), np.log(total)[..., 0]


def table(mask, text_length=None):
    """The mask written out, [batch or 1, 1, S, S]."""
    position = np.arange(mask.num_tokens)
    length = None if text_length is None else np.asarray(text_length)[:, None, None]
    kept = mask.keep(position[None, :, None], position[None, None, :], length)
    return kept.reshape(-1, 1, *kept.shape[-2:])


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *((case, "xla") for case in CASES),
        *slow_but([("text and sink", "reference")], ((case, "reference") for case in CASES)),
    ],
)
def test_sparse_attention_and_log_sum_exp_are_exact(case, implementation):
    mask, head_dim, lengths = CASES[case]
    query, key, value = qkv = random_qkv(mask.num_tokens, head_dim)
    text_length = None
    if lengths is not None:  # whatever padding holds must not matter
        text_length = jnp.array(lengths, jnp.int32)
        real = jnp.asarray(
            mask.is_real(np.arange(mask.num_tokens)[None], np.array(lengths)[:, None])
        )
        query, key, value = (jnp.where(real[:, :, None, None], x, jnp.nan) for x in qkv)
    out, lse = block_sparse_attention(
        query, key, value, masks=mask, text_length=text_length,
        implementation=implementation, return_lse=True,
    )  # fmt: skip
    expected, expected_lse = exact(qkv, table(mask, lengths))
    scale = np.abs(expected).max() or 1
    assert np.abs(np.asarray(out) - expected).max() <= 3e-6 * scale
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    empty = np.isneginf(expected_lse)
    np.testing.assert_array_equal(
        np.asarray(out).swapaxes(1, 2)[np.broadcast_to(empty, lse.shape)], 0
    )


def test_in_bfloat16_the_error_is_that_of_rounding_alone():
    mask = BandMask(613, 100, text_start=0, text_tokens=17)
    qkv = tuple(x.astype(jnp.bfloat16) for x in random_qkv(613, 64))
    out = block_sparse_attention(*qkv, masks=mask)
    assert out.dtype == jnp.bfloat16
    expected, _ = exact([np.asarray(x, np.float32) for x in qkv], table(mask))
    rounded = np.asarray(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16), np.float64)
    error = np.square(np.asarray(out, np.float64) - expected).mean()
    assert error <= 1.1 * np.square(rounded - expected).mean()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_head_runs_its_own_mask(implementation):
    masks = (BandMask(200, 20), BandMask(200, 200), BandMask(200, 50, sink_tokens=30))
    of_head = jnp.array([[0, 2], [1, 0]], jnp.int32)
    qkv = random_qkv(200, 32)
    out = block_sparse_attention(
        *qkv, masks=masks, mask_of_head=of_head, implementation=implementation
    )
    keep = np.stack([table(mask)[0, 0] for mask in masks])[np.asarray(of_head)]
    np.testing.assert_allclose(out, exact(qkv, keep)[0], rtol=1e-4, atol=1e-5)


def test_neither_labels_nor_prompts_recompile():
    masks = (BandMask(90, 10, text_tokens=8), BandMask(90, 30, text_tokens=8))
    qkv, traces = random_qkv(90, 32), 0

    @jax.jit
    def attend(of_head, text_length):
        nonlocal traces
        traces += 1
        return block_sparse_attention(
            *qkv, masks=masks, mask_of_head=of_head, text_length=text_length
        )

    outs = [
        attend(jnp.full((2, 2), i % 2, jnp.int32), jnp.array([i, 8], jnp.int32)) for i in range(4)
    ]
    assert traces == 1
    assert not np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize("case", slow_but(["HunyuanVideo"], ["CogVideoX", "HunyuanVideo", "Wan"]))
def test_gradients_are_those_of_the_reference(case):
    mask, head_dim, lengths = CASES[case]
    text_length = None if lengths is None else jnp.array(lengths, jnp.int32)
    qkv = random_qkv(mask.num_tokens, head_dim, heads=1)
    weight = random_qkv(mask.num_tokens, head_dim, seed=9, heads=1)[0]

    def loss(qkv, implementation):
        out, lse = block_sparse_attention(
            *qkv, masks=mask, text_length=text_length,
            implementation=implementation, return_lse=True,
        )  # fmt: skip
        return jnp.sum(out * weight) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    ours, reference = (jax.grad(loss)(qkv, name) for name in IMPLEMENTATIONS)
    for gradient, expected in zip(ours, reference, strict=True):
        assert np.isfinite(gradient).all()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * scale, rtol=1e-3)


def test_memory_of_the_backward_pass_is_linear_in_the_sequence():
    def temporaries(tokens):
        mask = BandMask(tokens, 64)
        shapes = [jax.ShapeDtypeStruct((1, tokens, 1, 32), jnp.float32)] * 3
        gradient = jax.grad(lambda *qkv: block_sparse_attention(*qkv, masks=mask).sum(), (0, 1, 2))
        analysis = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)


def test_vmap_is_a_batch():
    mask = BandMask(120, 30, sink_tokens=10)
    qkv = [x[:, None] for x in random_qkv(120, 32)]
    out = jax.vmap(partial(block_sparse_attention, masks=mask))(*qkv)
    expected = block_sparse_attention(*(x[:, 0] for x in qkv), masks=mask)
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_listed_blocks_are_attended_whole_and_none_gives_zeros(implementation):
    qkv = random_qkv(300, 32, batch=1, heads=1)
    counts = jnp.array([[[2, 0, 3]]], jnp.int32)
    blocks = jnp.array([[[[2, 0, 1], [1, 1, 1], [1, 2, 0]]]], jnp.int32)  # 2 is a partial block
    listed = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    keep = listed.repeat(128, axis=0).repeat(128, axis=1)[:300, :300]
    out, lse = block_list_attention(
        *qkv, counts=counts, blocks=blocks, implementation=implementation
    )
    expected, expected_lse = exact(qkv, keep[None, None])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(out)[0, 128:256], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 130, 701])
def test_dense_attention_is_exact(tokens, implementation):
    query, key, value = qkv = random_qkv(tokens, 40)
    lengths = np.array([max(tokens - 77, 0), tokens])
    real = np.arange(tokens)[None] < lengths[:, None]
    poisoned = (jnp.where(real[:, :, None, None], x, jnp.nan) for x in (key, value))
    out, lse = dense_attention(
        query, *poisoned, key_value_seq_lengths=jnp.asarray(lengths, jnp.int32),
        implementation=implementation, return_lse=True,
    )  # fmt: skip
    expected, expected_lse = exact(qkv, real[:, None, None, :])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_sampled_rows_are_exact_under_every_mask_and_zero_without_a_key():
    query, key, value = random_qkv(333, 32)
    rows = np.array([[0, 5, 200, 332], [1, 2, 3, 4]])
    mask, everything = BandMask(333, 40), BandMask(333, 333)
    nothing = BandMask(333, 1, text_tokens=333)  # text, and none of it is real
    position = jnp.arange(333, dtype=jnp.int32)
    out = sampled_attention(
        jnp.take_along_axis(query, jnp.asarray(rows)[:, :, None, None], axis=1),
        key,
        value,
        masks=(mask, everything, nothing),
        query_positions=jnp.broadcast_to(jnp.asarray(rows, jnp.int32), (3, 2, 4)),
        key_positions=jnp.broadcast_to(position, (3, 333)),
        text_length=jnp.zeros(2, jnp.int32),
        block_kv=64,
    )
    for number, whole in enumerate([table(mask), np.ones((1, 1, 333, 333), bool)]):
        expected, _ = exact((query, key, value), whole)
        expected = np.take_along_axis(expected, rows[:, :, None, None], axis=1).swapaxes(1, 2)
        np.testing.assert_allclose(out[number], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out[2], 0)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"masks": ()}, "masks is empty"),
        ({"masks": BandMask(11, 2)}, "made for 11 tokens"),
        ({"masks": (BandMask(10, 2), BandMask(10, 3))}, "mask_of_head"),
        ({"masks": BandMask(10, 2), "text_length": jnp.zeros(2, jnp.int32)}, "no mask has text"),
        (
            {
                "masks": (BandMask(10, 2, text_tokens=3), BandMask(10, 2)),
                "mask_of_head": jnp.zeros((2, 2), jnp.int32),
                "text_length": jnp.zeros(2, jnp.int32),
            },
            "place text apart",
        ),
        ({"masks": BandMask(10, 2), "scale": -1.0}, "scale must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        block_sparse_attention(*random_qkv(10, 32), **arguments)


def test_mixed_dtypes_are_refused_and_cudnn_says_why_it_cannot_run():
    query, key, value = random_qkv(10, 32)
    with pytest.raises(ValueError, match="share one dtype"):
        block_sparse_attention(query, key.astype(jnp.bfloat16), value, masks=BandMask(10, 2))
    with pytest.raises(ValueError, match="cudnn"):
        dense_attention(query, key, value, implementation="cudnn")


@pytest.mark.parametrize("lengths", [None, (7, 4)])
def test_cudnn_sees_even_numbers_of_tokens_alone_for_it_has_no_gradient_of_others(
    lengths, monkeypatch
):
    """Here stands in for cuDNN what computes the same on any device."""
    formula, seen = jax.nn.dot_product_attention, []

    def stand_in(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        seen.append((query.shape[1], key.shape[1]))
        return formula(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    query = random_qkv(5, 8)[0]
    key, value, _ = random_qkv(7, 8)
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)

    def squares(attend):
        return lambda *qkv: jnp.square(attend(*qkv)).sum()

    by_cudnn = squares(lambda q, k, v: cudnn_attention(q, k, v, None, lengths, scale=0.3)[0])
    gradients = jax.grad(by_cudnn, (0, 1, 2))(query, key, value)
    exact = squares(
        partial(
            dense_attention, key_value_seq_lengths=lengths, scale=0.3, implementation="reference"
        )
    )
    expected = jax.grad(exact, (0, 1, 2))(query, key, value)
    assert seen == [(6, 8)]
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)

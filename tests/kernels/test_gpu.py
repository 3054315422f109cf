"""The Hopper kernels on a Hopper GPU, against float64.

    JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu -n 6
    JAX_PLATFORMS=cuda pytest tests/kernels/test_gpu.py -n 0 -k fast

The second command is for speed, which is measured where nothing else is on the GPU.

The law: the largest error is at most twice that of a float64 reference whose weights and outputs
are rounded to the kernel's dtype. Padding holds NaN, and so does the memory before each call.
"""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from svg_jax import SparsityConfig, VideoLayout, sparse_attention
from svg_jax.cli import comparisons
from svg_jax.kernels import BandMask, block_list_attention, block_sparse_attention
from svg_jax.kernels import mosaic_attention as mosaic
from svg_jax.models.attention import dense_attention as model_attention

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import attention as benchmark

pytestmark = pytest.mark.gpu
DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class Case:
    """What a program is compiled for. Text lengths and masks of heads are drawn for each call."""

    masks: tuple[BandMask, ...]
    head_dim: int
    batch: int = 1
    heads: int = 2
    padded: bool = False
    dtype: str = "bfloat16"
    scale: float | None = None


def text_first(tokens, band, text):
    return BandMask(tokens, band, text_start=0, text_tokens=text)


def text_last(tokens, band, text):
    return BandMask(tokens, band, text_start=tokens - text, text_tokens=text)


CASES = {
    "text first": Case((text_first(1003, 200, 226),), 64),
    "text last": Case((text_last(1500, 300, 256),), 128, batch=2, padded=True),
    "text first and padded": Case((text_first(777, 131, 40),), 128, batch=3, padded=True),
    "text last, short heads": Case((text_last(900, 64, 33),), 32, batch=2, padded=True),
    "sink": Case((BandMask(1100, 129, sink_tokens=90),), 128),
    "sink, short heads": Case((BandMask(1201, 300, sink_tokens=301),), 48),
    "text and sink": Case((BandMask(640, 99, 0, 30, sink_tokens=75),), 64, padded=True),
    "several": Case(
        tuple(text_last(901, band, 40) for band in (1, 130, 901)), 64, 2, 3, padded=True
    ),
    "several with sinks": Case((BandMask(515, 5, sink_tokens=9), BandMask(515, 515)), 128, 1, 4),
    "everything": Case((BandMask(1024, 1024),), 128),
    "the diagonal": Case((BandMask(257, 1),), 64),
    "one token": Case((BandMask(1, 1),), 64, batch=2),
    "text alone": Case((BandMask(131, 1, text_tokens=131),), 128, batch=2, padded=True),
    "float16": Case((text_last(700, 90, 50),), 64, padded=True, dtype="float16"),
    "float16, long heads": Case((BandMask(700, 90, sink_tokens=50),), 128, dtype="float16"),
    "peaked": Case((BandMask(900, 200, sink_tokens=50),), 128, scale=4.0),
    "peaked, short heads": Case((BandMask(900, 200, sink_tokens=50),), 16, scale=20.0),
    "flat": Case((text_first(1400, 1000, 9),), 64, scale=1e-3),
}
FAMILIES = {
    "CogVideoX": VideoLayout(7, 131, text_tokens=37, text_position="first"),
    "HunyuanVideo": VideoLayout(8, 120, text_tokens=45, text_position="last"),
    "Wan": VideoLayout(9, 111),
}


@dataclass(frozen=True)
class Data:
    """One call's arrays: numpy, in the kernel's dtype; padding holds NaN in `poisoned`."""

    qkv: np.ndarray
    poisoned: np.ndarray
    options: dict[str, Any]
    keep: np.ndarray
    real: np.ndarray


def draw(case: Case, seed: int) -> Data:
    rng = np.random.default_rng(seed)
    tokens = case.masks[0].num_tokens
    shape = (3, case.batch, tokens, case.heads, case.head_dim)
    qkv = (1.5 * rng.standard_normal(shape)).astype(DTYPES[case.dtype])
    of_head = rng.integers(len(case.masks), size=(case.batch, case.heads))
    options: dict[str, Any] = {"mask_of_head": jnp.asarray(of_head, jnp.int32)}
    position = np.arange(tokens)
    lengths, real = None, np.ones((case.batch, tokens), bool)
    if case.padded:
        lengths = rng.integers(case.masks[0].text_tokens + 1, size=case.batch)
        options["text_length"] = jnp.asarray(lengths, jnp.int32)
        real = case.masks[0].is_real(position, lengths[:, None])
        lengths = lengths[:, None, None]
    tables = [
        np.broadcast_to(
            mask.keep(position[:, None], position, lengths), (case.batch, tokens, tokens)
        )
        for mask in case.masks
    ]
    keep = np.stack(tables, axis=1)[np.arange(case.batch)[:, None], of_head]
    poisoned = np.where(real[:, :, None, None], qkv, np.array(np.nan, qkv.dtype))
    return Data(qkv, poisoned, options, keep, real)


def attend_in_float64(qkv, keep, scale=None, rounded_to=None):
    """Output and log-sum-exp; with `rounded_to`, weights and outputs are rounded to that dtype."""
    query, key, value = (x.astype(np.float64).swapaxes(1, 2) for x in qkv)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = np.where(keep, query @ key.swapaxes(-1, -2) * scale, -np.inf)
    top = np.maximum(logits.max(-1, keepdims=True), -1e300)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    if rounded_to is not None:
        weights = weights.astype(rounded_to).astype(np.float64)
    out = (weights @ value / np.where(total > 0, total, 1)).swapaxes(1, 2)
    if rounded_to is not None:
        out = out.astype(rounded_to).astype(np.float64)
    with np.errstate(divide="ignore"):
        return out, (top + np.log(total))[..., 0]


def assert_errs_like_rounding(out, qkv, keep, scale=None):
    exact, lse = attend_in_float64(qkv, keep, scale)
    rounded, _ = attend_in_float64(qkv, keep, scale, rounded_to=qkv.dtype)
    error = np.abs(np.asarray(out, np.float64) - exact).max()
    # Where rounding is exact, float32's own remains.
    assert error <= 2 * np.abs(rounded - exact).max() + 2e-6 * np.abs(exact).max()
    return lse


def poison_memory(*like):
    """Leave NaN where the next outputs of these shapes are likely to lie."""
    arrays = [jnp.full(x.shape, jnp.nan, x.dtype) for x in like for _ in range(3)]
    for array in jax.block_until_ready(arrays):
        array.delete()


def compiled(case: Case, **more):
    return jax.jit(
        partial(
            block_sparse_attention,
            masks=case.masks,
            scale=case.scale,
            implementation="mosaic_gpu",
            return_lse=True,
            **more,
        )
    )


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def assert_follows_the_contract(case: Case, data: Data, attend):
    arguments = [jnp.asarray(x) for x in data.poisoned]
    out, lse = first = attend(*arguments, **data.options)
    assert out.dtype == jnp.dtype(case.dtype)
    assert lse.dtype == jnp.float32
    assert np.isfinite(np.asarray(out, np.float32)).all()
    expected_lse = assert_errs_like_rounding(out, data.qkv, data.keep, case.scale)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=2e-5)  # −inf where it is −inf
    assert not np.asarray(out, np.float32)[~data.real].any()
    for _ in range(2):
        poison_memory(out, lse)
        assert_same_bits(attend(*arguments, **data.options), first)


@pytest.mark.parametrize("name", CASES)
def test_errs_like_rounding_and_gives_the_same_bits_again(name):
    case = CASES[name]
    attend = compiled(case)
    for seed in range(2):  # new labels and text lengths in the same program
        assert_follows_the_contract(case, draw(case, seed), attend)
    assert attend._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("seed", range(10))
def test_any_shape_follows_the_contract(seed):
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(2, 1500))
    text = int(rng.integers(1, min(tokens, 300)))
    start = [0, tokens - text][seed % 2]
    masks = tuple(
        BandMask(tokens, int(rng.integers(1, tokens + 1)), start, text, int(rng.integers(tokens)))
        for _ in range(1 + seed % 3)
    )
    head_dim = int(rng.choice([8, 16, 40, 64, 128, 128]))
    batch, heads = (int(x) for x in rng.integers(1, 4, size=2))
    case = Case(masks, head_dim, batch, heads, padded=seed % 4 > 0)
    assert_follows_the_contract(case, draw(case, seed), compiled(case))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("overlap", [True, False])
def test_both_schedules_follow_the_contract(overlap, head_dim):
    case = Case((text_last(610, 150, 30),), head_dim, padded=True)
    attend = jax.jit(
        partial(
            mosaic.block_sparse_attention,
            masks=case.masks,
            scale=case.head_dim**-0.5,
            tiling=mosaic.Tiling(overlap=overlap),
        )
    )
    assert_follows_the_contract(case, draw(case, 0), attend)


@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_listed_blocks_are_attended_whole_and_none_gives_zeros(head_dim):
    rng = np.random.default_rng(0)
    tokens, batch, heads = 1100, 2, 2
    qkv = rng.standard_normal((3, batch, tokens, heads, head_dim)).astype(ml_dtypes.bfloat16)
    num = -(-tokens // 128)
    counts = rng.integers(num + 1, size=(batch, heads, num))
    counts[0, 0, 3] = 0
    blocks = rng.permuted(np.tile(np.arange(num), (batch, heads, num, 1)), axis=-1)
    listed = np.arange(num) < counts[..., None]
    of_blocks = np.zeros((batch, heads, num, num), bool)
    np.put_along_axis(of_blocks, blocks, listed, axis=-1)
    keep = of_blocks.repeat(128, axis=2).repeat(128, axis=3)[..., :tokens, :tokens]
    attend = jax.jit(partial(mosaic.block_list_attention, scale=head_dim**-0.5))
    poison_memory(jnp.asarray(qkv[0]))
    out, lse = attend(
        *(jnp.asarray(x) for x in qkv),
        counts=jnp.asarray(counts, jnp.int32),
        blocks=jnp.asarray(blocks, jnp.int32),
    )
    expected_lse = assert_errs_like_rounding(out, qkv, keep)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=2e-5)
    empty = np.isneginf(expected_lse).swapaxes(1, 2)
    assert empty.any()
    assert not np.asarray(out, np.float32)[empty].any()


def loss_of(case: Case, data: Data, implementation, attend=block_sparse_attention):
    """A loss that needs the gradients of output and log-sum-exp."""
    weight = jnp.asarray(np.random.default_rng(9).standard_normal(data.qkv.shape[1:]), jnp.float32)

    def loss(qkv):
        out, lse = attend(
            *qkv, masks=case.masks, implementation=implementation, return_lse=True, **data.options
        )
        of_lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sum(out.astype(jnp.float32) * weight) + jnp.sum(of_lse)

    return loss


def assert_near(gradients, expected, share):
    for gradient, wanted in zip(gradients, expected, strict=True):
        gradient, wanted = np.asarray(gradient, np.float64), np.asarray(wanted, np.float64)
        assert np.isfinite(gradient).all()
        assert np.linalg.norm(gradient - wanted) <= share * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["text first", "text last", "sink"])
def test_gradients_are_those_of_the_reference(name):
    case = CASES[name]
    data = draw(case, 1)
    narrow = tuple(jnp.asarray(x) for x in data.poisoned)
    wide = tuple(jnp.asarray(x.astype(np.float32)) for x in data.qkv)
    gradients = jax.jit(jax.grad(loss_of(case, data, "mosaic_gpu")))(narrow)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)
    expected = jax.jit(jax.grad(loss_of(case, data, "reference")))(wide)
    assert_near(gradients, expected, 2**-7)  # rounded to bfloat16 on the way and in the end


def test_rematerialisation_gives_the_same_gradients():
    case = CASES["text and sink"]
    data = draw(case, 1)
    narrow = tuple(jnp.asarray(x) for x in data.qkv)
    loss = loss_of(case, data, "mosaic_gpu")
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(narrow)
    assert_near(again, jax.jit(jax.grad(loss))(narrow), 2**-9)


def test_vmap_is_a_batch():
    case = CASES["text last"]
    data = draw(case, 2)
    attend = compiled(case)
    arguments = [jnp.asarray(x) for x in data.poisoned]
    expected = attend(*arguments, **data.options)

    def one(query, key, value, mask_of_head, text_length):
        out, lse = attend(
            query[None],
            key[None],
            value[None],
            mask_of_head=mask_of_head[None],
            text_length=text_length[None],
        )
        return out[0], lse[0]

    query, key, value = arguments
    of_head, lengths = data.options["mask_of_head"], data.options["text_length"]
    actual = jax.vmap(one)(query, key, value, of_head, lengths)
    assert_same_bits(actual, expected)


def test_heads_may_be_sharded():
    case = CASES["several with sinks"]
    data = draw(case, 0)
    query, key, value = (jnp.asarray(x) for x in data.qkv)
    of_head = data.options["mask_of_head"]
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    of_heads = PartitionSpec(None, None, "heads")

    def attend(query, key, value, mask_of_head):
        return compiled(case)(query, key, value, mask_of_head=mask_of_head)

    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(of_heads, of_heads, of_heads, PartitionSpec(None, "heads")),
        out_specs=(of_heads, PartitionSpec(None, "heads")),
    )
    expected = attend(query, key, value, of_head)
    assert_same_bits(jax.jit(sharded)(query, key, value, of_head), expected)


def test_an_exported_program_comes_back_and_gives_the_same_bits():
    pytest.importorskip("flatbuffers")  # without which jax cannot write programs
    case = CASES["text first and padded"]
    data = draw(case, 0)
    arguments = [jnp.asarray(x) for x in data.poisoned]
    attend = compiled(case)
    stable = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    exported = export.export(attend, disabled_checks=[stable])(*arguments, **data.options)
    again = export.deserialize(exported.serialize())
    expected = attend(*arguments, **data.options)
    assert_same_bits(again.call(*arguments, **data.options), expected)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_attention_is_that_of_float32_but_for_rounding(family, head_dim):
    """Weights and output are rounded, so every |error| is at most 2 · 2⁻⁸ · Σ weight · |value|."""
    layout = FAMILIES[family]
    rng = np.random.default_rng(0)
    shape = (3, 2, layout.num_tokens, 3, head_dim)
    qkv = tuple(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16))
    labels = jnp.asarray(rng.integers(2, size=(2, 3)), bool)
    text_length = jnp.array([layout.text_tokens, 5], jnp.int32) if layout.text_tokens else None
    attend = partial(
        sparse_attention,
        layout=layout,
        config=SparsityConfig(density=0.3),
        labels=labels,
        text_length=text_length,
    )
    poison_memory(*qkv)
    out, info = attend(*qkv)
    query, key, value = (x.astype(jnp.float32) for x in qkv)
    expected, expected_info = attend(query, key, value, implementation="xla")
    most, _ = attend(query, key, jnp.abs(value), implementation="xla")
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(out, np.float32)).all()
    error = np.abs(np.asarray(out, np.float32) - np.asarray(expected))
    # Rows of padded text are 0 in both.
    np.testing.assert_array_less(error, 1.01 * 2**-7 * np.asarray(most) + 1e-6)
    np.testing.assert_array_equal(info.labels, expected_info.labels)
    assert info.density == expected_info.density


@pytest.mark.parametrize("position", ["first", "last"])
def test_what_padding_holds_never_matters_to_labels_nor_to_dense_attention(position):
    layout = VideoLayout(8, 120, text_tokens=45, text_position=position)
    length = jnp.array([45, 5, 0], jnp.int32)
    text = np.arange(layout.num_tokens) - layout.text_start
    padding = (text >= np.asarray(length)[:, None]) & (text >= 0) & (text < layout.text_tokens)
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((3, 3, layout.num_tokens, 3, 64)), jnp.bfloat16)
    nan = jnp.array(jnp.nan, jnp.bfloat16)
    poisoned = jnp.where(jnp.asarray(padding)[None, :, :, None, None], nan, qkv)

    @jax.jit
    def attend(qkv):
        def run(qkv, density):
            return sparse_attention(
                *qkv, layout=layout, config=SparsityConfig(density=density, sampled_rows=32),
                rng=jax.random.key(0), text_length=length,
            )  # fmt: skip

        def loss(qkv, density):
            return jnp.square(run(qkv, density)[0].astype(jnp.float32)).sum()

        dense, _ = model_attention(*qkv, layout=layout, text_length=length)
        outputs = run(qkv, 0.5), run(qkv, 1.0), dense
        return outputs, [jax.grad(loss)(qkv, density) for density in (0.5, 1.0)]

    outputs, gradients = attend(qkv)
    poisoned_outputs, poisoned_gradients = attend(poisoned)
    assert_same_bits(poisoned_outputs, outputs)
    assert np.asarray(outputs[0][1].labels).any()
    for x in jax.tree.leaves((outputs, gradients, poisoned_gradients)):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    for gradient, expected in zip(poisoned_gradients, gradients, strict=True):
        assert_near(gradient, expected, 2**-9)  # cuDNN adds gradients in no order


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_profiling_and_layout_run_on_meshes(kind):
    layout = FAMILIES["HunyuanVideo"]
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((3, 2, layout.num_tokens, 4, 64)), jnp.bfloat16)
    length = jnp.array([45, 5], jnp.int32)
    mesh = jax.make_mesh((1, 1), ("data", "heads"), axis_types=(kind,) * 2)
    spec = PartitionSpec("data", None, "heads")

    def attend(query, key, value, rng, text_length):
        def loss(query):
            out, info = sparse_attention(
                query, key, value, layout=layout, rng=rng, text_length=text_length,
                config=SparsityConfig(density=0.4, sampled_rows=32),
            )  # fmt: skip
            return jnp.square(out.astype(jnp.float32)).sum(), (out, info.labels)

        return jax.grad(loss, has_aux=True)(query)

    arguments = (*qkv, jax.random.key(0), length)
    expected = jax.jit(attend)(*arguments)
    run = attend
    if kind == AxisType.Auto:
        run = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(spec, spec, spec, PartitionSpec(), PartitionSpec("data")),
            out_specs=(spec, (spec, PartitionSpec("data", "heads"))),
        )
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in qkv]
    gradient, outputs = jax.jit(run)(*placed, *arguments[3:])
    assert_same_bits(outputs, expected[1])
    assert_near([gradient], [expected[0]], 2**-9)


def test_listed_blocks_have_the_oracles_gradient():
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 300, 2, 64)), jnp.float32)
    counts = jnp.array([[[2, 0, 3], [1, 1, 0]]], jnp.int32)
    blocks = jnp.asarray(np.tile([2, 0, 1], (1, 2, 3, 1)), jnp.int32)

    def loss(qkv, implementation):
        out, _ = block_list_attention(
            *qkv, counts=counts, blocks=blocks, implementation=implementation
        )
        return jnp.square(out.astype(jnp.float32)).sum()

    gradients = jax.jit(jax.grad(partial(loss, implementation="mosaic_gpu")))(
        qkv.astype(jnp.bfloat16)
    )
    expected = jax.jit(jax.grad(partial(loss, implementation="reference")))(qkv)
    assert_near(gradients, expected, 2**-5)  # inputs and outputs are rounded to bfloat16


def test_what_it_cannot_run_is_refused_in_a_sentence():
    x = jnp.zeros((1, 9, 1, 64), jnp.float32)
    attend = partial(block_sparse_attention, masks=BandMask(9, 2), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="bfloat16 or float16, not float32"):
        attend(x, x, x)
    x = jnp.zeros((1, 9, 1, 96), jnp.bfloat16)
    with pytest.raises(ValueError, match="head_dim"):
        attend(x, x, x)


def test_the_demo_uses_the_kernel_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompt = {"prompt": "a red three moving left over the flower"}
    comparisons.demo(prompt, sparsity={}, output=Path("demo"), source=None)
    assert "mosaic_gpu in bfloat16" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".gif"}


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="others are on the GPU: pass -n 0")
def test_the_kernel_is_as_fast_as_it_was():
    assert benchmark.main(["--sections", "cases", "--check", "--rounds", "9"]) == 0

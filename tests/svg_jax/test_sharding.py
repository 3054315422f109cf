"""Batch and heads spread over devices: the output of one device, and nothing is gathered.

Types are checked on a mesh of one device. What moves between devices is seen on four only, which
another process has: it runs this very file.
"""

import os
import subprocess
import sys
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from svg_jax import (
    SparsityConfig,
    StepState,
    VideoLayout,
    Warmup,
    attend_dense,
    attend_sparse,
    sparse_attention,
)
from svg_jax.kernels import block_list_attention

FIRST = VideoLayout(num_frames=3, tokens_per_frame=11, text_tokens=5, text_position="first")
LAST = VideoLayout(num_frames=3, tokens_per_frame=11, text_tokens=5)
CONFIG = SparsityConfig(density=0.6, sampled_rows=6, band_multiple=4)
SPEC, OF_HEADS = P("data", None, "heads"), P("data", "heads")
MOVES = ("all-gather", "all-to-all", "collective-permute")
four_devices = pytest.mark.skipif(jax.device_count() != 4, reason="needs four devices")


def arguments(layout, labels=False) -> tuple[Any, ...]:
    """Queries, keys, values, a PRNG key, lengths of text and labels or None."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((3, 4, layout.num_tokens, 4, 8), np.float32)
    given = jnp.asarray(rng.integers(2, size=(4, 4)), bool) if labels else None
    return *map(jnp.asarray, qkv), jax.random.key(1), jnp.array([5, 3, 0, 4], jnp.int32), given


def attend(layout):
    def run(query, key, value, rng, text_length, labels):
        out, info = sparse_attention(
            query, key, value, layout=layout, config=CONFIG, rng=rng, labels=labels,
            text_length=text_length,
        )  # fmt: skip
        return out, info.labels

    return run


def attend_otherwise(query, key, value, rng, text_length, labels):
    """Dense attention, listed blocks, gradients of sparse attention, a layer behind dense ones."""
    video = {"layout": LAST, "text_length": text_length}
    dense, _ = attend_dense(query, key, value, layer=jnp.int32(0), step_state=None, **video)
    one = jnp.ones((query.shape[0], query.shape[2], 1), jnp.int32)
    listed, _ = block_list_attention(query, key, value, counts=one, blocks=one[..., None] - 1)

    def loss(query):
        out, _ = sparse_attention(query, key, value, config=CONFIG, rng=rng, **video)
        return jnp.square(out).sum()

    layers = attend_sparse(CONFIG, 2, warmup=Warmup(layers=0.5))
    of_layer, _ = layers(query, key, value, layer=jnp.int32(1), step_state=StepState(rng), **video)
    return dense, listed, jax.grad(loss)(query), of_layer


def mesh_of(kind, shape):
    return jax.make_mesh(shape, ("data", "heads"), axis_types=(kind,) * 2)


def placed(mesh, arguments, spec=SPEC) -> tuple[Any, ...]:
    query, key, value, rng, length, labels = arguments
    qkv = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value))
    length = jax.device_put(length, NamedSharding(mesh, P(*spec[:1])))
    return *qkv, rng, length, labels


def in_shard_map(function, mesh, labels, out_specs):
    in_specs = (SPEC,) * 3 + (P(), P("data"), OF_HEADS if labels else P())
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_types_are_those_that_meshes_ask_for(kind):
    mesh, given = mesh_of(kind, (1, 1)), arguments(LAST)
    run = attend_otherwise
    if kind is AxisType.Auto:
        run = in_shard_map(run, mesh, False, (SPEC,) * 4)
    assert_equal(jax.jit(run)(*placed(mesh, given)), jax.jit(attend_otherwise)(*given))


def test_vmap_goes_over_shard_map_and_explicit_axes():
    given = arguments(FIRST)
    stacked = [jnp.stack([x, 2 * x]) for x in given[:3]]
    mesh = mesh_of(AxisType.Explicit, (1, 1))
    over = partial(jax.vmap, in_axes=(0, 0, 0, None, None, None))
    expected = jax.jit(over(attend(FIRST)))(*stacked, *given[3:])
    within = in_shard_map(attend(FIRST), mesh, False, (SPEC, OF_HEADS))
    actual = jax.jit(over(within))(
        *(jax.device_put(x, NamedSharding(mesh, P(None, *SPEC))) for x in stacked),
        *placed(mesh, given)[3:],
    )
    assert_equal(actual, expected)


@cache
def on_one_device(layout, labels):
    return jax.jit(attend(layout))(*arguments(layout, labels))


@four_devices
@pytest.mark.parametrize(
    ("kind", "spec", "layout", "labels"),
    [
        (AxisType.Auto, SPEC, FIRST, False),
        (AxisType.Auto, P(None, None, ("heads", "data")), LAST, True),
        (AxisType.Explicit, SPEC, LAST, True),
        (AxisType.Explicit, P(("data", "heads")), FIRST, False),
        ("shard_map", SPEC, LAST, False),
    ],
)
def test_four_devices_give_the_output_of_one_and_gather_nothing(kind, spec, layout, labels):
    run = attend(layout)
    mesh = mesh_of(AxisType.Auto if kind == "shard_map" else kind, (2, 2))
    if kind == "shard_map":
        run = in_shard_map(run, mesh, labels, (SPEC, OF_HEADS))
    spread = placed(mesh, arguments(layout, labels), spec)
    compiled = jax.jit(run).lower(*spread).compile()
    assert_equal(compiled(*spread), on_one_device(layout, labels))
    program = compiled.as_text() or ""
    assert program
    assert not [move for move in MOVES if f"{move}(" in program or f"{move}-start(" in program]


@four_devices
def test_a_sequence_that_is_split_over_devices_is_gathered():
    layout = VideoLayout(num_frames=3, tokens_per_frame=9, text_tokens=5)  # 32 tokens
    split = placed(mesh_of(AxisType.Explicit, (2, 2)), arguments(layout), P(None, "data", "heads"))
    assert_equal(attend(layout)(*split), on_one_device(layout, labels=False))


@pytest.mark.skipif(jax.device_count() > 1, reason="is the other process")
def test_the_tests_on_four_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "devices", __file__],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "6 passed" in run.stdout

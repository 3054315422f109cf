"""Sparse VideoGen attention: profile, lay out, attend, restore; and the callables models take."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from svg_jax import kernels
from svg_jax.classify import check_config, errors_of_masks, sample_rows
from svg_jax.config import SparsityConfig, Warmup, dense_layer_count
from svg_jax.kernels import checks
from svg_jax.kernels.sharding import vary_like
from svg_jax.masks import realised_density, sparse_mask, warn_of_lost_sparsity
from svg_jax.models import Attend, VideoLayout
from svg_jax.models.attention import check_arguments
from svg_jax.models.attention import dense_attention as attend_dense
from svg_jax.token_order import to_frame_major, to_token_major

Key = PRNGKeyArray | UInt32[Array, " words"]
"""A PRNG key, typed (`jax.random.key`) or raw (`jax.random.PRNGKey`)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseAttentionInfo:
    """What a call of `sparse_attention` found out. Stacked over layers, each gains a first axis.

    In a run's records its arrays are numpy's; batch entries are then as the model saw them: under
    guidance those of the negative prompt first.

    Attributes:
        labels: True where a head is temporal.
        errors: Mean squared errors of the spatial and the temporal mask; NaN if labels were given,
            0 at density 1.
        density: Share of the S×S map that was computed, mean over the batch: exact, token by token.
    """

    labels: Bool[Array | np.ndarray, "*layers batch heads"]
    errors: Float[Array | np.ndarray, "*layers batch heads 2"]
    density: Float[Array | np.ndarray, "*layers"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """What a pipeline tells an `attend` about a step; models hand it through unread.

    Attributes:
        rng: PRNG key of the step; fold the layer's number in: `jax.random.fold_in(rng, layer)`.
        labels: Labels to use in place of profiling, or None.
    """

    rng: Key
    labels: Bool[Array, "layers batch heads"] | None = None


def sparse_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    layout: VideoLayout,
    config: SparsityConfig,
    rng: Key | None = None,
    labels: Bool[Array, "batch heads"] | None = None,
    text_length: Int[Array, " batch"] | None = None,
    implementation: kernels.Implementation | None = None,
) -> tuple[Float[Array, "batch tokens heads head_dim"], SparseAttentionInfo]:
    """Attend to a video's tokens, each head inside its own sparse pattern.

    Batch and heads may be spread over devices, by `shard_map`, on Explicit axes or on Auto ones:
    no device needs another. Where tokens or head_dim are spread, they are gathered first.

    Args:
        query: Queries after QK-norm and RoPE, tokens in frame-major order, text first or last.
        key: Keys, ordered as the queries.
        value: Values, ordered as the queries.
        layout: Where video and text stand. Static.
        config: Density, sampled rows, sink and rounding of the band. Static.
        rng: PRNG key for the sampled rows, the same ones in all batch entries; needed unless labels
            are given.
        labels: True where a head is temporal: skips profiling. For ablations and goldens.
        text_length: Real text tokens of each batch entry; None if all are real. What padding holds
            never matters, be it NaN, and its rows are 0. Under a trace, where it cannot be checked,
            it is clamped to the text.
        implementation: The kernel to use; None picks one (see `svg_jax.kernels`).

    Returns:
        The output, ordered as the input, and what was found out on the way.

    Raises:
        ValueError: Neither rng nor labels; arrays that do not fit the layout; a density that is too
            small for the text.
    """
    lengths = check_arguments(query, key, value, layout, text_length)
    check_config(config)
    if rng is not None:
        checks.check_key("rng", rng)
    batch, _, heads, head_dim = query.shape
    checks.check_booleans("labels", labels, (batch, heads), "[batch, heads]")
    kernels.pick_implementation(implementation, head_dim, query.dtype)
    if rng is None and labels is None and config.density < 1:
        raise ValueError("sparse_attention profiles heads with a PRNG key: give rng, or labels")
    return _sparse_attention(
        query,
        key,
        value,
        rng,
        labels,
        lengths,
        layout=layout,
        config=config,
        implementation=implementation,
    )


@partial(jax.jit, static_argnames=("layout", "config", "implementation"))
def _sparse_attention(
    query,
    key,
    value,
    rng,
    labels,
    text_length,
    *,
    layout: VideoLayout,
    config: SparsityConfig,
    implementation: kernels.Implementation | None,
):
    batch, _, heads, _ = query.shape
    if config.density >= 1:
        info = SparseAttentionInfo(
            labels=jnp.zeros((batch, heads), bool) if labels is None else labels,
            errors=jnp.zeros((batch, heads, 2), jnp.float32),
            density=jnp.ones((), jnp.float32),
        )
        video = {"layout": layout, "text_length": text_length}
        kernel = None if implementation == "mosaic_gpu" else implementation  # cuDNN is faster
        return attend_dense(query, key, value, implementation=kernel, **video)[0], info
    warn_of_lost_sparsity(layout, config)
    mask = sparse_mask(layout, config)
    implementation = kernels.pick_implementation(implementation, query.shape[-1], query.dtype)
    # A Hopper kernel wants tokens in eights: laying out can add the rest at no cost.
    eights = -(-layout.num_tokens // 8) * 8 if implementation == "mosaic_gpu" else None

    def attend(query, key, value, rows, labels, text_length):
        if labels is None:
            errors = errors_of_masks(query, key, value, rows, text_length, layout, mask)
            temporal = errors[..., 1] < errors[..., 0]
        else:
            temporal = labels
            errors = jnp.full((*labels.shape, 2), jnp.nan, jnp.float32)
        laid_out = to_token_major(
            query, key, value, layout=layout, temporal=temporal, num_tokens=eights
        )
        out = kernels.block_sparse_attention(
            *laid_out, masks=mask, text_length=text_length, implementation=implementation
        )
        return *to_frame_major(out, layout=layout, temporal=temporal), temporal, errors

    rows = None if labels is not None else sample_rows(rng, layout, config.sampled_rows)
    on_devices = kernels.on_each_device(
        attend, ("btho", "btho", "btho", "r", "bh", "b"), ("btho", "bh", "bhm")
    )
    out, temporal, errors = on_devices(query, key, value, rows, labels, text_length)
    return out, SparseAttentionInfo(temporal, errors, realised_density(mask, text_length))


def attend_sparse(
    config: SparsityConfig,
    num_layers: int,
    implementation: kernels.Implementation | None = None,
    *,
    warmup: Warmup | None = None,
) -> Attend:
    """`sparse_attention` as a model's `attend`, with the first layers dense.

    Equal arguments give the same callable, so that a jitted step which takes it as a static
    argument compiles once.

    Args:
        config: Density, number of sampled rows, sink and rounding of the band.
        num_layers: Layers of the model: `warmup.layers` is a share of them.
        implementation: The kernel to use; None picks one.
        warmup: Layers that stay dense; None is `Warmup()`, without any. A layer knows no steps:
            `warmup.steps` says nothing here.

    Returns:
        A callable whose `step_state` is a `StepState` and whose info is a `SparseAttentionInfo`.
        In a dense layer labels are False, errors NaN and the density 1.
    """
    check_config(config)
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers counts the model's layers, at least 1: got {num_layers!r}")
    if not isinstance(warmup, Warmup | None):
        raise ValueError(f"warmup must be a Warmup, not {type(warmup).__name__}")
    dense_layers = dense_layer_count(warmup or Warmup(), num_layers)
    return _attend_sparse(config, num_layers, dense_layers, implementation)


@cache
def _attend_sparse(
    config: SparsityConfig,
    num_layers: int,
    dense_layers: int,
    implementation: kernels.Implementation | None,
) -> Attend:
    dense_kernel = None if implementation == "mosaic_gpu" else implementation  # cuDNN is faster

    def dense(query, key, value, **video):
        batch, _, heads, _ = query.shape
        info = SparseAttentionInfo(
            labels=jnp.zeros((batch, heads), bool),
            errors=jnp.full((batch, heads, 2), jnp.nan, jnp.float32),
            density=jnp.ones((), jnp.float32),
        )
        return attend_dense(query, key, value, implementation=dense_kernel, **video)[0], info

    def attend(query, key, value, *, layout, text_length, layer, step_state) -> Any:
        check_arguments(query, key, value, layout, text_length)
        if not isinstance(step_state, StepState):
            raise ValueError(
                f"attend_sparse takes a StepState as step_state, not {type(step_state).__name__}"
            )
        checks.check_key("rng", step_state.rng)
        shape = (num_layers, query.shape[0], query.shape[2])
        checks.check_booleans("labels", step_state.labels, shape, "[layers, batch, heads]")

        def sparse(query, key, value):
            labels = None if step_state.labels is None else step_state.labels[layer]
            return sparse_attention(
                query,
                key,
                value,
                layout=layout,
                config=config,
                rng=jax.random.fold_in(step_state.rng, layer),
                labels=labels,
                text_length=text_length,
                implementation=implementation,
            )

        dense_of = partial(dense, layout=layout, text_length=text_length)
        if dense_layers == 0:
            return sparse(query, key, value)
        if dense_layers == num_layers:
            return dense_of(query, key, value)

        def alike(out, info):
            """Give dense layers and sparse ones results of one type, inside `shard_map` too."""
            return out, SparseAttentionInfo(
                labels=vary_like(info.labels, query),
                errors=vary_like(info.errors, query),
                density=info.density
                if text_length is None
                else vary_like(info.density, text_length),
            )

        return jax.lax.cond(
            layer < dense_layers,
            lambda *qkv: alike(*dense_of(*qkv)),
            lambda *qkv: alike(*sparse(*qkv)),
            query,
            key,
            value,
        )

    return attend

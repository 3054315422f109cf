"""Sparse VideoGen attention: profile, lay out, attend, restore; and the callables models take."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from svg_jax import kernels
from svg_jax.classify import classify_heads
from svg_jax.config import SparsityConfig, dense_layer_count
from svg_jax.layout import to_frame_major, to_token_major
from svg_jax.masks import realised_density, sparse_mask
from svg_jax.models import Attend, VideoLayout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseAttentionInfo:
    """What a call of `sparse_attention` found out. Stacked over layers, each gains a first axis.

    Attributes:
        labels: True where a head is temporal.
        errors: Mean squared errors of the spatial and the temporal mask; NaN if labels were given,
            0 at density 1.
        density: Share of the S×S map that was computed, mean over the batch: exact, token by token.
    """

    labels: Bool[Array, "*layers batch heads"]
    errors: Float[Array, "*layers batch heads 2"]
    density: Float[Array, "*layers"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """What `attend_sparse` needs to know of a step; models hand it through unread.

    Attributes:
        rng: The step's PRNG key; each layer folds its index in.
        labels: Labels to use in place of profiling, or None.
    """

    rng: PRNGKeyArray
    labels: Bool[Array, "layers batch heads"] | None = None


@partial(jax.jit, static_argnames=("layout", "config", "implementation"))
def sparse_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    layout: VideoLayout,
    config: SparsityConfig,
    rng: PRNGKeyArray | None = None,
    labels: Bool[Array, "batch heads"] | None = None,
    text_length: Int[Array, " batch"] | None = None,
    implementation: kernels.Implementation | None = None,
) -> tuple[Float[Array, "batch tokens heads head_dim"], SparseAttentionInfo]:
    """Attention of a video's tokens, each head inside its own sparse pattern.

    Args:
        query: After QK-norm and RoPE, tokens in frame-major order, text first or last.
        key: Likewise.
        value: Likewise.
        layout: Where video and text stand. Static.
        config: Density and number of sampled rows. Static.
        rng: PRNG key for the sampled rows; needed unless labels are given.
        labels: True where a head is temporal: skips profiling. For ablations and goldens.
        text_length: Real text tokens of each batch entry; None if all are real. Rows of padded text
            are unspecified but finite.
        implementation: The kernel to use; None picks one (see `svg_jax.kernels`).

    Returns:
        The output, ordered as the input, and what was found out on the way.

    Raises:
        ValueError: Neither rng nor labels; arrays that do not fit the layout; a density that is too
            small for the text.
    """
    if query.shape[1] != layout.num_tokens:
        raise ValueError(f"query has {query.shape[1]} tokens, {layout} has {layout.num_tokens}")
    batch, _, heads, _ = query.shape
    if config.density >= 1:
        info = SparseAttentionInfo(
            labels=jnp.zeros((batch, heads), bool) if labels is None else labels,
            errors=jnp.zeros((batch, heads, 2), jnp.float32),
            density=jnp.ones((), jnp.float32),
        )
        return _dense(query, key, value, layout, text_length, implementation), info
    if labels is not None:
        temporal, errors = labels, jnp.full((batch, heads, 2), jnp.nan, jnp.float32)
    elif rng is not None:
        temporal, errors = classify_heads(
            query, key, value, layout=layout, config=config, rng=rng, text_length=text_length
        )
    else:
        raise ValueError("sparse_attention profiles heads with a PRNG key: give rng, or labels")
    mask = sparse_mask(layout, config)
    info = SparseAttentionInfo(temporal, errors, realised_density(mask, text_length))
    implementation = kernels.pick_implementation(implementation, query.shape[-1], query.dtype)
    # A Hopper kernel wants tokens in eights: laying out can add the rest at no cost.
    eights = -(-layout.num_tokens // 8) * 8 if implementation == "mosaic_gpu" else None
    laid_out = to_token_major(
        query, key, value, layout=layout, temporal=temporal, num_tokens=eights
    )
    out = kernels.block_sparse_attention(
        *laid_out, masks=mask, text_length=text_length, implementation=implementation
    )
    (out,) = to_frame_major(out, layout=layout, temporal=temporal)
    return out, info


def attend_dense(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    layout: VideoLayout,
    text_length: Int[Array, " batch"] | None,
    layer: Int[Array, ""],
    step_state: object,
) -> tuple[Float[Array, "batch tokens heads head_dim"], None]:
    """The kernels' dense attention as a model's `attend`."""
    return _dense(query, key, value, layout, text_length, None), None


@cache
def attend_sparse(
    config: SparsityConfig,
    num_layers: int,
    implementation: kernels.Implementation | None = None,
) -> Attend:
    """`sparse_attention` as a model's `attend`, with the first layers dense.

    Equal arguments give the same callable, so that a jitted step which takes it as a static
    argument compiles once.

    Args:
        config: Density, dense layers, number of sampled rows.
        num_layers: Layers of the model: `dense_layers` is a share of them.
        implementation: The kernel to use; None picks one.

    Returns:
        A callable whose `step_state` is a `StepState` and whose info is a `SparseAttentionInfo`.
        In a dense layer labels are False, errors NaN and the density 1.
    """
    dense_layers = dense_layer_count(config, num_layers)

    def dense(query, key, value, layout, text_length):
        batch, _, heads, _ = query.shape
        info = SparseAttentionInfo(
            labels=jnp.zeros((batch, heads), bool),
            errors=jnp.full((batch, heads, 2), jnp.nan, jnp.float32),
            density=jnp.ones((), jnp.float32),
        )
        return _dense(query, key, value, layout, text_length, implementation), info

    def attend(query, key, value, *, layout, text_length, layer, step_state) -> Any:
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

        if dense_layers == 0:
            return sparse(query, key, value)
        if dense_layers == num_layers:
            return dense(query, key, value, layout, text_length)
        return jax.lax.cond(
            layer < dense_layers,
            partial(dense, layout=layout, text_length=text_length),
            sparse,
            query,
            key,
            value,
        )

    return attend


def _dense(
    query,
    key,
    value,
    layout: VideoLayout,
    text_length,
    implementation: kernels.Implementation | None,
):
    lengths = None
    if text_length is not None:
        if layout.text_position == "first":
            # Padding amid the sequence is no length: the band mask knows it.
            mask = kernels.BandMask(
                num_tokens=layout.num_tokens,
                band_width=layout.num_tokens,
                text_start=layout.text_start,
                text_tokens=layout.text_tokens,
            )
            return kernels.block_sparse_attention(
                query,
                key,
                value,
                masks=mask,
                text_length=text_length,
                implementation=implementation,
            )
        lengths = layout.video_tokens + text_length
    if implementation == "mosaic_gpu":  # which asks for sparse attention: dense has a better one
        implementation = None
    return kernels.dense_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation=implementation
    )

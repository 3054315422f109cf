"""Online profiling: which heads are spatial, which temporal, at this layer and step (paper, 4.1).

A few query rows are attended exactly, and again under the spatial and under the temporal mask; the
mask whose output is nearer to the exact one wins. Rows come from the whole video, masks are closed
forms with the run's own band, and one pass over the keys serves all three outputs.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from svg_jax.config import SparsityConfig
from svg_jax.kernels import BandMask, checks, on_each_device, sampled_attention
from svg_jax.masks import sparse_mask
from svg_jax.models import VideoLayout
from svg_jax.models.attention import check_arguments
from svg_jax.token_order import token_major_position


def sample_rows(
    rng: PRNGKeyArray | UInt32[Array, " words"], layout: VideoLayout, sampled_rows: int
) -> Int[Array, " rows"]:
    """Draw distinct video tokens, one from each of equally long stretches of the whole video.

    All batch entries share them, so that an entry's labels depend neither on the others nor on the
    device that it lies on. Takes O(rows) work; drawing without replacement from all S tokens would
    sort them.

    Returns:
        int32 positions in the sequence; all video tokens if there are fewer than `sampled_rows`.
    """
    rows = min(sampled_rows, layout.video_tokens)
    bounds = np.arange(rows + 1, dtype=np.int64) * layout.video_tokens // rows
    bounds = layout.video_start + bounds.astype(np.int32)
    # The default dtype is another one under jax_enable_x64, and draws other numbers.
    return jax.random.randint(rng, (rows,), bounds[:-1], bounds[1:], dtype=jnp.int32)


def classify_heads(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    layout: VideoLayout,
    config: SparsityConfig,
    rng: PRNGKeyArray | UInt32[Array, " words"],
    text_length: Int[Array, " batch"] | None = None,
) -> tuple[Bool[Array, "batch heads"], Float[Array, "batch heads 2"]]:
    """Tell temporal heads from spatial ones by the outputs of sampled rows.

    Args:
        query: Queries after QK-norm and RoPE, tokens in frame-major order.
        key: Keys, ordered as the queries.
        value: Values, ordered as the queries.
        layout: Where video and text stand. Static.
        config: Density and number of sampled rows. Static.
        rng: PRNG key of this layer and step.
        text_length: Real text tokens of each batch entry; None if all are real. What padding holds
            never matters.

    Returns:
        Labels, True where a head is temporal (ties are spatial), and float32 mean squared errors
        of the spatial and of the temporal mask against dense attention.

    Raises:
        ValueError: If arrays do not fit the layout, or the density is too small for the text.
    """
    lengths = check_arguments(query, key, value, layout, text_length)
    check_config(config)
    if rng is None:
        raise ValueError("classify_heads samples rows with a PRNG key: give rng")
    checks.check_key("rng", rng)
    return _classify_heads(query, key, value, rng, lengths, layout=layout, config=config)


@partial(jax.jit, static_argnames=("layout", "config"))
def _classify_heads(
    query, key, value, rng, text_length, *, layout: VideoLayout, config: SparsityConfig
):
    rows = sample_rows(rng, layout, config.sampled_rows)
    mask = sparse_mask(layout, config)

    def classify(query, key, value, rows, text_length):
        errors = errors_of_masks(query, key, value, rows, text_length, layout, mask)
        return errors[..., 1] < errors[..., 0], errors

    on_devices = on_each_device(classify, ("btho", "btho", "btho", "r", "b"), ("bh", "bhm"))
    return on_devices(query, key, value, rows, text_length)


def errors_of_masks(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    rows: Int[Array, " rows"],
    text_length: Int[Array, " batch"] | None,
    layout: VideoLayout,
    mask: BandMask,
) -> Float[Array, "batch heads 2"]:
    """Mean squared errors of the sampled rows' outputs under the spatial and the temporal mask.

    Args:
        query: Queries in frame-major order.
        key: Keys, ordered as the queries.
        value: Values, ordered as the queries.
        rows: Positions of the sampled rows.
        text_length: Real text tokens of each batch entry; None if all are real.
        layout: Where video and text stand.
        mask: The mask of both patterns, each in its own order of tokens.
    """
    # Labels are constants: what they come from has no gradient.
    query, key, value = (jax.lax.stop_gradient(x) for x in (query, key, value))
    dense = dataclasses.replace(mask, band_width=mask.num_tokens, sink_tokens=0)
    tokens = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    places = jnp.stack([rows, rows, token_major_position(rows, layout)])[:, None]
    outputs = sampled_attention(
        jnp.take(query, rows, axis=1, mode="clip"),
        key,
        value,
        masks=(dense, mask, mask),
        query_positions=jnp.repeat(places, query.shape[0], axis=1),
        key_positions=jnp.stack([tokens, tokens, token_major_position(tokens, layout)]),
        text_length=text_length,
    )
    errors = jnp.square(outputs[1:] - outputs[:1]).mean((-2, -1))
    return jnp.moveaxis(errors, 0, -1)


def check_config(config: Any) -> None:
    """ValueError unless it says where attention is sparse."""
    if not isinstance(config, SparsityConfig):
        raise ValueError(f"config must be a SparsityConfig, not {type(config).__name__}")

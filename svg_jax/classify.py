"""Online profiling: which heads are spatial, which temporal, at this layer and step (paper, 4.1).

A few query rows are attended exactly, and again under the spatial and under the temporal mask; the
mask whose output is nearer to the exact one wins. Rows come from the whole video, masks are closed
forms with the run's own band, and one pass over the keys serves all three outputs.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from svg_jax.config import SparsityConfig
from svg_jax.kernels import sampled_attention
from svg_jax.layout import token_major_position
from svg_jax.masks import sparse_mask
from svg_jax.models import VideoLayout


def sample_rows(
    rng: PRNGKeyArray, layout: VideoLayout, batch: int, sampled_rows: int
) -> Int[Array, "batch rows"]:
    """Draw distinct video tokens, one from each of equally long stretches of the whole video.

    Takes O(rows) work; drawing without replacement from all S tokens would sort them.

    Returns:
        Positions in the sequence; all video tokens if there are fewer than `sampled_rows`.
    """
    rows = min(sampled_rows, layout.video_tokens)
    bounds = np.arange(rows + 1, dtype=np.int64) * layout.video_tokens // rows
    bounds = layout.video_start + bounds.astype(np.int32)
    return jax.random.randint(rng, (batch, rows), bounds[None, :-1], bounds[None, 1:])


@partial(jax.jit, static_argnames=("layout", "config"))
def classify_heads(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    layout: VideoLayout,
    config: SparsityConfig,
    rng: PRNGKeyArray,
    text_length: Int[Array, " batch"] | None = None,
) -> tuple[Bool[Array, "batch heads"], Float[Array, "batch heads 2"]]:
    """Tell temporal heads from spatial ones by the outputs of sampled rows.

    Args:
        query: After QK-norm and RoPE, tokens in frame-major order.
        key: Likewise.
        value: Likewise.
        layout: Where video and text stand. Static.
        config: Density and number of sampled rows. Static.
        rng: Key of this layer and step.
        text_length: Real text tokens of each batch entry; None if all are real.

    Returns:
        Labels, True where a head is temporal (ties are spatial), and float32 mean squared errors
        of the spatial and of the temporal mask against dense attention.
    """
    # Labels are constants: what they come from has no gradient.
    query, key, value = (jax.lax.stop_gradient(x) for x in (query, key, value))
    mask = sparse_mask(layout, config)
    rows = sample_rows(rng, layout, query.shape[0], config.sampled_rows)
    dense = dataclasses.replace(mask, band_width=mask.num_tokens, sink_tokens=0)
    tokens = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    outputs = sampled_attention(
        jnp.take_along_axis(query, rows[:, :, None, None], axis=1),
        key,
        value,
        masks=(dense, mask, mask),
        query_positions=jnp.stack([rows, rows, token_major_position(rows, layout)]),
        key_positions=jnp.stack([tokens, tokens, token_major_position(tokens, layout)]),
        text_length=text_length,
    )
    errors = jnp.square(outputs[1:] - outputs[:1]).mean((-2, -1))
    errors = jnp.moveaxis(errors, 0, -1)
    return errors[..., 1] < errors[..., 0], errors

"""The attention that a model is given: its signature, and a dense default."""

import math
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from svg_jax import kernels
from svg_jax.kernels import checks
from svg_jax.models.layout import VideoLayout

_ROWS = 256  # query rows of a block: the fastest on a CPU, where 512 fall out of the cache


@runtime_checkable
class Attend(Protocol):
    """Self-attention over one sequence of text and video, as a model's layer calls it.

    Query and key come after normalisation and rotary embedding; scores are scaled by
    1 / sqrt(head_dim). It is called while a step is traced, so it has to be a pure function of its
    arrays; a callable that is not the same object (or not equal) is compiled anew.
    """

    def __call__(
        self,
        query: Float[Array, "batch tokens heads head_dim"],
        key: Float[Array, "batch tokens heads head_dim"],
        value: Float[Array, "batch tokens heads head_dim"],
        *,
        layout: VideoLayout,
        text_length: Int[Array, " batch"] | None,
        layer: Int[Array, ""],
        step_state: Any,
    ) -> tuple[Float[Array, "batch tokens heads head_dim"], Any]:
        """Attend in one layer.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            layout: Where text and video stand in the sequence; static.
            text_length: Real text tokens of each batch entry, traced; None if all are real. Padded
                text is neither query (its rows are zero) nor key.
            layer: Number of the layer, traced.
            step_state: What the caller of the model passed, whole and unread; a pipeline passes a
                `svg_jax.StepState`.

        Returns:
            The output, and anything to be known about the layer: the model stacks it over layers.
        """
        ...


def dense_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    layout: VideoLayout,
    text_length: Int[Array, " batch"] | None = None,
    layer: Int[Array, ""] | None = None,
    step_state: Any = None,
    implementation: Literal["xla", "reference"] | None = None,
) -> tuple[Float[Array, "batch tokens heads head_dim"], None]:
    """Attend to all real tokens, as a model's `attend` (see `Attend`); padded rows are 0.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        layout: Where text and video stand in the sequence.
        text_length: Real text tokens of each batch entry; None if all are real.
        layer: Number of the layer, ignored.
        step_state: Anything, ignored.
        implementation: Kernel to use; None picks the device's fastest (see `svg_jax.kernels`).
    """
    del layer, step_state
    length = check_arguments(query, key, value, layout, text_length)
    if length is not None and layout.text_position == "first":
        # Padding amid the sequence is no length: the band mask knows it.
        mask = kernels.BandMask(
            num_tokens=layout.num_tokens,
            band_width=layout.num_tokens,
            text_start=layout.text_start,
            text_tokens=layout.text_tokens,
        )
        out = kernels.block_sparse_attention(
            query, key, value, masks=mask, text_length=length, implementation=implementation
        )
        return out, None
    lengths = None if length is None else layout.video_tokens + length
    out = kernels.dense_attention(
        query,
        key,
        value,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return out, None


def check_arguments(
    query: Any, key: Any, value: Any, layout: Any, text_length: Any
) -> Int[Array, " batch"] | None:
    """Check that attention over a video can take these arguments.

    Args:
        query: Argument given as queries.
        key: Argument given as keys.
        value: Argument given as values.
        layout: Argument given as the layout.
        text_length: Argument given as the texts' lengths, or None.

    Returns:
        The lengths as int32, clamped to the layout's text: under a trace they cannot be checked.

    Raises:
        ValueError: If they do not fit together.
    """
    if not isinstance(layout, VideoLayout):
        raise ValueError(f"layout must be a VideoLayout, not {type(layout).__name__}")
    checks.check_arrays(query, key, value)
    for name, x in (("query", query), ("key", key)):
        checks.check_tokens(name, x, layout.num_tokens, layout)
    if text_length is None:
        return None
    if not layout.text_tokens:
        raise ValueError(f"text_length is given, but no text is in {layout}: leave it None")
    checks.check_integers("text_length", text_length, (query.shape[0],), "[batch]")
    checks.check_range("text_length", text_length, 0, layout.text_tokens)
    return jnp.clip(jnp.asarray(text_length).astype(jnp.int32), 0, layout.text_tokens)


def cross_attention(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    key_length: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch rows heads head_dim"]:
    """Attend to another sequence, such as a text.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        key_length: How many keys of each batch entry count, from the first on; None if all do.
    """
    checks.check_arrays(query, key, value)
    checks.check_integers("key_length", key_length, query.shape[:1], "[batch]")
    scale = 1 / math.sqrt(query.shape[-1])
    return kernels.dense_attention(query, key, value, key_value_seq_lengths=key_length, scale=scale)


def frame_causal_attention(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    *,
    frame_tokens: int,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Exact attention to one's own frame and all frames before it, by blocks of query rows.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        frame_tokens: Tokens of a frame.
    """
    batch, tokens, heads, head_dim = query.shape
    frame_of_key = jnp.arange(tokens)[None, :] // frame_tokens
    rows = min(_ROWS, tokens)
    blocks = -(-tokens // rows)
    query = jnp.pad(query, ((0, 0), (0, blocks * rows - tokens), (0, 0), (0, 0)))
    query = jnp.moveaxis(query.reshape(batch, blocks, rows, heads, head_dim), 1, 0)

    @jax.checkpoint  # or the backward pass would keep the scores of all blocks: tokens squared
    def attend_rows(block: tuple[Array, Array]) -> Array:
        queries, first = block
        frame_of_row = (first + jnp.arange(rows))[:, None] // frame_tokens
        bias = jnp.where(frame_of_key <= frame_of_row, 0.0, -jnp.inf)
        return softmax_attention(queries, key, value, scale=head_dim**-0.5, bias=bias[None, None])

    out = jax.lax.map(attend_rows, (query, rows * jnp.arange(blocks)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * rows, heads, head_dim)[:, :tokens]


def softmax_attention(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    scale: float,
    bias: Float[Array, "1 #heads rows keys"] | None = None,
    keep: Bool[Array, "batch keys"] | None = None,
    causal: bool = False,
) -> Float[Array, "batch rows heads head_dim"]:
    """Attention as the formula stands, scores in float32, all of them at once.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        scale: Factor of the scores.
        bias: Added to the scores, for each head or all of them.
        keep: The keys that count; None if all do.
        causal: Whether a query sees the keys up to its own place only.
    """
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias
    if keep is not None:
        scores = jnp.where(keep[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    if causal:
        is_past = jnp.tri(*scores.shape[-2:], dtype=bool)
        scores = jnp.where(is_past[None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

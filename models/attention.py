"""The attention that a model is given: its signature, and a dense default."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from svg_jax.kernels import checks, cudnn
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
) -> tuple[Float[Array, "batch tokens heads head_dim"], None]:
    """Exact attention: cuDNN in 16 bit on a GPU, else by blocks of query rows (see `Attend`)."""
    del layer, step_state
    check_arguments(query, key, value, layout, text_length)
    if text_length is None:
        return _attend(query, key, value, None), None
    # Padding stands at the end of the text; with the text last it stands at the end of all tokens,
    # where one length per batch entry describes it.
    shift = layout.text_tokens if layout.text_position == "first" else 0
    query, key, value = (jnp.roll(x, -shift, axis=1) for x in (query, key, value))
    length = layout.video_tokens + text_length
    out = _attend(_blanked(query, length), key, value, length)
    return jnp.roll(_blanked(out, length), shift, axis=1), None


def check_arguments(query: Any, key: Any, value: Any, layout: Any, text_length: Any) -> None:
    """ValueError, in one sentence, unless attention over a video can take these arguments.

    Args:
        query: What is given as queries.
        key: What is given as keys.
        value: What is given as values.
        layout: What is given as the layout.
        text_length: What is given as the texts' lengths; None is not looked at.
    """
    if not isinstance(layout, VideoLayout):
        raise ValueError(f"layout must be a VideoLayout, not {type(layout).__name__}")
    checks.check_arrays(query, key, value)
    for name, x in (("query", query), ("key", key)):
        checks.check_tokens(name, x, layout.num_tokens, layout)
    if text_length is not None and not layout.text_tokens:
        raise ValueError(f"text_length is given, but no text is in {layout}: leave it None")
    checks.check_integers("text_length", text_length, (query.shape[0],), "[batch]")
    checks.check_range("text_length", text_length, 0, layout.text_tokens)


def cross_attention(
    query: Float[Array, "batch rows heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    key_length: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch rows heads head_dim"]:
    """Exact attention to another sequence, such as a text; computed as `dense_attention` is.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        key_length: How many keys of each batch entry count, from the first on; None if all do.
    """
    checks.check_arrays(query, key, value)
    checks.check_integers("key_length", key_length, query.shape[:1], "[batch]")
    return _attend(query, key, value, key_length)


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
    frame_of_key = jnp.arange(key.shape[1])[None, :] // frame_tokens

    def attend_rows(rows: Array, first: Array) -> Array:
        frame_of_row = (first + jnp.arange(rows.shape[1]))[:, None] // frame_tokens
        bias = jnp.where(frame_of_key <= frame_of_row, 0.0, -jnp.inf)
        return softmax_attention(
            rows, key, value, scale=query.shape[-1] ** -0.5, bias=bias[None, None]
        )

    return _by_rows(attend_rows, query)


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


def _attend(query: Array, key: Array, value: Array, length: Array | None) -> Array:
    head_dim = query.shape[-1]
    if not cudnn.why_not(head_dim, query.dtype):
        return cudnn.cudnn_attention(query, key, value, key_value_seq_lengths=length)
    if length is not None:  # padding may hold NaN, which no weight of 0 hides
        key, value = _blanked(key, length), _blanked(value, length)
    keep = None if length is None else _below(key.shape[1], length)

    def attend_rows(rows: Array, first: Array) -> Array:
        del first
        return softmax_attention(rows, key, value, scale=head_dim**-0.5, keep=keep)

    return _by_rows(attend_rows, query)


def _below(size: int, length: Array) -> Array:
    return jnp.arange(size, dtype=length.dtype)[None, :] < length[:, None]


def _blanked(x: Array, length: Array) -> Array:
    """Put 0 behind the lengths of [batch, tokens, heads, head_dim]."""
    return jnp.where(_below(x.shape[1], length)[:, :, None, None], x, jnp.zeros((), x.dtype))


def _by_rows(attend_rows: Callable[[Array, Array], Array], query: Array) -> Array:
    """Attends with blocks of query rows, one after the other.

    Args:
        attend_rows: (queries, number of the first) -> output.
        query: All queries [batch, tokens, heads, head_dim].
    """
    batch, tokens, heads, head_dim = query.shape
    rows = min(_ROWS, tokens)
    blocks = -(-tokens // rows)
    query = jnp.pad(query, ((0, 0), (0, blocks * rows - tokens), (0, 0), (0, 0)))
    query = jnp.moveaxis(query.reshape(batch, blocks, rows, heads, head_dim), 1, 0)

    @jax.checkpoint  # or the backward pass would keep the scores of all blocks: tokens squared
    def attend_block(block: tuple[Array, Array]) -> Array:
        return attend_rows(*block)

    out = jax.lax.map(attend_block, (query, rows * jnp.arange(blocks)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(batch, blocks * rows, heads, head_dim)[:, :tokens]

"""The paper's two patterns as one mask: from a density to a band, and to the kernels' closed form.

A spatial head looks at a few frames around its own: in frame-major order, a band about the
diagonal. A temporal head looks at one place in all frames: in token-major order, the very same band
(Sparse VideoGen, section 4).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from svg_jax.config import SparsityConfig
from svg_jax.kernels import BandMask, kept_pairs
from svg_jax.models import VideoLayout


def band_width(layout: VideoLayout, config: SparsityConfig) -> int:
    """Width w of the band that spends the density: a token keeps what is fewer than w tokens away.

    With S tokens of which C are text, text rows and columns take 2C/S of the map and the band the
    rest: w = S·(1 − √(1 − (density − 2C/S))). Where no text shares the sequence, the official code
    keeps |q − k| ≤ w and rounds w up (Wan); otherwise |q − k| < w, rounded down. A width that would
    round down to nothing is kept unrounded.

    Raises:
        ValueError: The text alone takes all of the density.
    """
    num_tokens = layout.num_tokens
    if config.density >= 1:
        return num_tokens
    text_share = 2 * layout.text_tokens / num_tokens
    if config.density <= text_share:
        raise ValueError(
            f"density {config.density:g} leaves nothing for the video: {layout.text_tokens} text "
            f"tokens of {num_tokens} take {text_share:.4f} of the map alone; the smallest density "
            f"that works is {math.floor(text_share * 1e4 + 1) / 1e4:.4f}"
        )
    width = num_tokens * (1 - math.sqrt(1 - (config.density - text_share)))
    multiple = config.band_multiple
    if layout.text_tokens == 0:
        return min(math.ceil(width / multiple) * multiple + 1, num_tokens)
    return math.floor(width / multiple) * multiple or max(1, math.ceil(width))


def sparse_mask(layout: VideoLayout, config: SparsityConfig) -> BandMask:
    """The mask that all heads share, once the temporal heads' tokens are laid out token-major.

    Raises:
        ValueError: The density is too small for the text (see `band_width`).
    """
    sink = config.first_frame_sink
    if sink is None:
        sink = layout.text_tokens == 0
    return BandMask(
        num_tokens=layout.num_tokens,
        band_width=band_width(layout, config),
        text_start=layout.text_start,
        text_tokens=layout.text_tokens,
        sink_tokens=layout.video_start + layout.tokens_per_frame if sink else 0,
    )


def realised_density(
    mask: BandMask, text_length: Int[Array, " batch"] | None = None
) -> Float[Array, ""]:
    """Share of the S×S map that a mask keeps: exact, token by token, mean over the batch.

    Sink, text and rounding are in it; pairs with padded text are not, though S counts padding.
    """
    share = jnp.asarray(kept_pairs(mask, text_length), jnp.float32) / float(mask.num_tokens**2)
    return share.mean()

"""The paper's two patterns as one mask: from a density to a band, and to the kernels' closed form.

A spatial head looks at a few frames around its own: in frame-major order, a band about the
diagonal. A temporal head looks at one place in all frames: in token-major order, the very same band
(Sparse VideoGen, section 4).
"""

import logging
import math
from functools import cache

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from svg_jax.config import SparsityConfig
from svg_jax.kernels import BandMask, kept_pairs
from svg_jax.models import VideoLayout

_LOGGER = logging.getLogger(__name__)


def band_width(layout: VideoLayout, config: SparsityConfig) -> int:
    """Width of the band that spends the density: a token keeps what is fewer tokens away than that.

    With S tokens of which C are text, text rows and columns take 2C/S of the map and the band the
    rest: w = S·(1 − √(1 − (density − 2C/S))). As the official code does, `layout.band_rounding`
    "up" rounds w up and keeps |q − k| ≤ w (Wan), "down" rounds it down and keeps |q − k| < w. A w
    that would round down to nothing is kept unrounded.

    The formula counts pairs of text twice; the text's exact share is 2C/S − C²/S². A density
    between the two leaves the formula nothing, and gives a band of one token.

    Raises:
        ValueError: The text alone takes all of the density.
    """
    num_tokens = layout.num_tokens
    if config.density >= 1:
        return num_tokens
    text_share = text_share_of(layout)
    if config.density <= text_share:
        smallest = min(math.floor(text_share * 1e4 + 1) / 1e4, 1.0)
        raise ValueError(
            f"density {config.density:g} leaves nothing for the video: {layout.text_tokens} text "
            f"tokens of {num_tokens} take {text_share:.4f} of the map alone; the smallest density "
            f"that works is {smallest:.4f}, a longer or larger video lowers it, and 1 is dense"
        )
    of_band = max(config.density - 2 * layout.text_tokens / num_tokens, 0.0)
    width = num_tokens * (1 - math.sqrt(1 - of_band))
    multiple = config.band_multiple
    if layout.band_rounding == "up":
        return min(math.ceil(width / multiple) * multiple + 1, num_tokens)
    return math.floor(width / multiple) * multiple or max(1, math.ceil(width))


def text_share_of(layout: VideoLayout) -> float:
    """Share of the S×S map that text rows and columns take, 2C/S − C²/S²."""
    share = layout.text_tokens / layout.num_tokens
    return share * (2 - share)


def sparse_mask(layout: VideoLayout, config: SparsityConfig) -> BandMask:
    """Make the mask that all heads share once temporal heads' tokens are token-major.

    Raises:
        ValueError: The density is too small for the text (see `band_width`).
    """
    sink = config.first_frame_sink
    if sink is None:
        sink = layout.first_frame_sink
    return BandMask(
        num_tokens=layout.num_tokens,
        band_width=band_width(layout, config),
        text_start=layout.text_start,
        text_tokens=layout.text_tokens,
        sink_tokens=layout.video_start + layout.tokens_per_frame if sink else 0,
    )


def warn_of_lost_sparsity(layout: VideoLayout, config: SparsityConfig) -> None:
    """Log the density that is computed, once, if less than half of the saving asked for is left.

    Short sequences lose it: the band is rounded to whole blocks of tokens, and the sink comes on
    top.

    Raises:
        ValueError: The density is too small for the text (see `band_width`).
    """
    _warn_once(sparse_mask(layout, config), float(config.density), int(config.band_multiple))


@cache
def _warn_once(mask: BandMask, density: float, band_multiple: int) -> None:
    kept = kept_pairs(mask) / mask.num_tokens**2
    if 1 - kept < (1 - density) / 2:
        _LOGGER.warning(
            "density %g was asked for, but %.4f is computed: of %d tokens the band is %d wide "
            "(band_multiple=%d) and %d are a sink; a smaller band_multiple or a longer video saves "
            "more",
            *(density, kept, mask.num_tokens, mask.band_width, band_multiple, mask.sink_tokens),
        )


def realised_density(
    mask: BandMask, text_length: Int[Array, " batch"] | None = None
) -> Float[Array, ""]:
    """Share of the S×S map that a mask keeps: exact, token by token, mean over the batch.

    Sink, text and rounding are in it; pairs with padded text are not, though S counts padding.
    """
    share = jnp.asarray(kept_pairs(mask, text_length), jnp.float32) / float(mask.num_tokens**2)
    return share.mean()

"""Captioned videos for the tiny model, made on the device: a digit in motion over a photograph.

"a red three moving left over the flower": 16 frames of 64x48. The background stands still, on a
grid of one patch (4 pixels); the digit moves in sub-pixel steps. Everything is drawn from a PRNG
key inside jit, so training never waits for the host.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

ASSETS = Path(__file__).with_name("tiny_assets.npz")
NUM_FRAMES, HEIGHT, WIDTH = 16, 48, 64
GRID = 4  # pixels between possible corners of the background crop
SPRITE_SIZE = 24
SPRITE_MARGIN = 2  # empty pixels of a sprite that may leave the picture

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "purple", "yellow", "green", "cyan", "blue", "pink", "white")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "moving diagonally",
    "bouncing",
    "circling",
    "standing still",
)
PLACES = ("flower", "pagoda", "cat", "coffee", "rocket", "stars")
QUESTIONS = {"digit": DIGITS, "colour": COLOURS, "motion": MOTIONS, "place": PLACES}
NUM_ANSWERS = tuple(len(answers) for answers in QUESTIONS.values())

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
CAPTION_TOKENS = 16

RGB = np.array(
    [
        (235, 30, 35),
        (150, 40, 220),
        (250, 230, 30),
        (40, 200, 60),
        (40, 225, 235),
        (30, 80, 255),
        (255, 80, 200),
        (255, 255, 255),
    ],
    np.float32,
)
OUTLINE_STRENGTH = 0.75


class Assets(NamedTuple):
    """What videos are composed of.

    Attributes:
        backgrounds: Every crop of every photograph, 0..255.
        sprites: Coverage of each digit and of its outline, 0..255.
    """

    backgrounds: UInt8[Array, "places crops height width rgb"]
    sprites: UInt8[Array, "digits size size layers"]


class Videos(NamedTuple):
    """A batch of captioned videos.

    Attributes:
        pixels: -1..1.
        digit: 1 where the digit and its outline cover the picture, 0 where the background shows.
        attributes: Index of the digit, colour, motion and place.
    """

    pixels: Float[Array, "batch frames channels height width"]
    digit: Float[Array, "batch frames 1 height width"]
    attributes: Int[Array, "batch 4"]


def load_assets(path: Path = ASSETS) -> Assets:
    """Read the photographs and digits that make_tiny_assets.py prepared."""
    with np.load(path) as arrays:
        photographs, sprites = arrays["photographs"], arrays["sprites"]
    windows = np.lib.stride_tricks.sliding_window_view(photographs, (HEIGHT, WIDTH), axis=(1, 2))
    crops = np.moveaxis(windows[:, ::GRID, ::GRID], 3, -1)
    crops = crops.reshape(len(photographs), -1, HEIGHT, WIDTH, 3)
    return Assets(jnp.asarray(crops), jnp.asarray(sprites))


def caption(attributes: np.ndarray) -> str:
    """Caption a video by its four attributes."""
    digit, colour, motion, place = (
        answers[int(index)] for answers, index in zip(QUESTIONS.values(), attributes, strict=True)
    )
    return f"a {colour} {digit} {motion} over the {place}"


def vocabulary() -> dict[str, int]:
    """Every word of every caption, numbered; the special tokens first."""
    words = [PAD, EOS, UNKNOWN, "a", "over", "the"]
    for answers in QUESTIONS.values():
        words += [word for answer in answers for word in answer.split()]
    return {word: number for number, word in enumerate(dict.fromkeys(words))}


def token_ids(text: str) -> np.ndarray:
    """Token ids of one caption, ended and padded as the exported tokenizer does: int32 [16]."""
    words = vocabulary()
    ids = [words.get(word, words[UNKNOWN]) for word in text.split()] + [words[EOS]]
    return np.array(ids + [words[PAD]] * (CAPTION_TOKENS - len(ids)), np.int32)


def caption_table() -> np.ndarray:
    """Token ids of every caption there is, by attributes: int32 [10, 8, 8, 6, 16]."""
    table = np.stack([token_ids(caption(np.array(index))) for index in np.ndindex(*NUM_ANSWERS)])
    return table.reshape(*NUM_ANSWERS, CAPTION_TOKENS)


def draw_attributes(rng: PRNGKeyArray, batch: int) -> Int[Array, "batch 4"]:
    """Attributes of a batch of videos, each uniform."""
    keys = jax.random.split(rng, len(NUM_ANSWERS))
    columns = [
        jax.random.randint(key, (batch,), 0, number)
        for key, number in zip(keys, NUM_ANSWERS, strict=True)
    ]
    return jnp.stack(columns, axis=-1)


def trajectories(rng: PRNGKeyArray, motion: Int[Array, " batch"]) -> Float[Array, "batch frames 2"]:
    """Top left corner (y, x) of the sprite in every frame, in pixels.

    Positions are made in the unit square of where the sprite may be. Straight motions cross 60 to
    95 % of it; a bouncing digit hops one and a half times while it drifts; a circling one goes
    round once.
    """
    batch = motion.shape[0]
    keys = jax.random.split(rng, 5)
    travel = jax.random.uniform(keys[0], (batch, 1, 2), minval=0.6, maxval=0.95)
    spot = jax.random.uniform(keys[1], (batch, 1, 2))
    sign = jnp.where(jax.random.bernoulli(keys[2], 0.5, (batch, 1, 2)), 1.0, -1.0)
    phase = jax.random.uniform(keys[3], (batch, 1))
    size = jax.random.uniform(keys[4], (batch, 1, 2))

    time = jnp.linspace(0.0, 1.0, NUM_FRAMES)[None, :, None]
    line = (time - 0.5) * travel  # about 0
    middle = travel / 2 + spot * (1.0 - travel)  # so that the line stays in the unit square
    forth, back, still = middle + line, middle - line, jnp.broadcast_to(spot, line.shape)

    up = jnp.stack([back[..., 0], still[..., 1]], axis=-1)
    down = jnp.stack([forth[..., 0], still[..., 1]], axis=-1)
    left = jnp.stack([still[..., 0], back[..., 1]], axis=-1)
    right = jnp.stack([still[..., 0], forth[..., 1]], axis=-1)
    diagonal = middle + sign * line

    turns = jnp.arange(NUM_FRAMES)[None, :] / NUM_FRAMES
    hop = jnp.abs(jnp.sin(jnp.pi * (1.5 * turns + phase)))
    floor, height = 0.85 + 0.15 * spot[..., 0], 0.45 + 0.2 * size[..., 0]
    drift = 0.25 + 0.3 * size[..., 1]
    drifting = (
        drift / 2 + spot[..., 1] * (1.0 - drift) + sign[..., 1] * drift * (time[..., 0] - 0.5)
    )
    bouncing = jnp.stack([floor - height * hop, drifting], axis=-1)

    radius = jnp.array([[[0.29, 0.19]]]) * (1.0 + 0.3 * size)  # y, x: nearly round in pixels
    angle = 2.0 * jnp.pi * (sign[..., 0] * turns + phase)
    centre = radius + spot * (1.0 - 2.0 * radius)
    circling = centre + radius * jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    choices = jnp.stack([left, right, up, down, diagonal, bouncing, circling, still], axis=1)
    unit = jnp.take_along_axis(choices, motion[:, None, None, None], axis=1)[:, 0]
    extent = jnp.array([HEIGHT, WIDTH], jnp.float32) - SPRITE_SIZE + 2 * SPRITE_MARGIN
    return unit * extent[None, None] - SPRITE_MARGIN


def _placement(corner: Float[Array, "batch frames"], length: int) -> Float[Array, "b f length 24"]:
    """Bilinear weights that bring a sprite's rows (or columns) to picture rows from `corner` on."""
    distance = (
        jnp.arange(length, dtype=jnp.float32)[:, None]
        - jnp.arange(SPRITE_SIZE, dtype=jnp.float32)[None, :]
    )
    return jax.nn.relu(1.0 - jnp.abs(distance[None, None] - corner[..., None, None]))


def make_videos(rng: PRNGKeyArray, assets: Assets, attributes: Int[Array, "batch 4"]) -> Videos:
    """Draw one video for each row of attributes.

    Args:
        rng: Decides the crop of the photograph and where exactly the digit goes.
        assets: From `load_assets`.
        attributes: Index of digit, colour, motion and place.

    Returns:
        The videos, float32.
    """
    crop_rng, path_rng = jax.random.split(rng)
    digit, colour, motion, place = (attributes[:, column] for column in range(4))
    crop = jax.random.randint(crop_rng, place.shape, 0, assets.backgrounds.shape[1])
    background = assets.backgrounds[place, crop].astype(jnp.float32)[:, None]

    path = trajectories(path_rng, motion)
    rows, columns = _placement(path[..., 0], HEIGHT), _placement(path[..., 1], WIDTH)
    sprites = assets.sprites[digit].astype(jnp.float32) / 255.0
    layers = jnp.einsum(
        "bfyi,bijl,bfxj->lbfyx", rows, sprites, columns, precision=jax.lax.Precision.HIGH
    )
    fill, outline = layers[0][..., None], layers[1][..., None]

    shaded = background * (1.0 - OUTLINE_STRENGTH * outline)
    painted = jnp.asarray(RGB)[colour][:, None, None, None]
    picture = shaded * (1.0 - fill) + painted * fill
    pixels = jnp.moveaxis(picture / 127.5 - 1.0, -1, 2)
    return Videos(pixels, jnp.moveaxis(jnp.maximum(fill, outline), -1, 2), attributes)


def balanced_attributes(seed: int, number: int) -> np.ndarray:
    """Attributes of captions to evaluate with: int32 [number, 4], every answer about as often."""
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(np.resize(rng.permutation(n), number)) for n in NUM_ANSWERS]
    return np.stack(columns, axis=-1).astype(np.int32)

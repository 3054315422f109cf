"""The tiny model's training data: captions, motions, and what the videos show."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from tiny_data import (
    COLOURS,
    DIGITS,
    EOS,
    HEIGHT,
    MOTIONS,
    NUM_ANSWERS,
    NUM_FRAMES,
    PAD,
    PLACES,
    RGB,
    UNKNOWN,
    WIDTH,
    balanced_attributes,
    caption,
    caption_table,
    draw_attributes,
    load_assets,
    make_videos,
    token_ids,
    trajectories,
    vocabulary,
)


def attributes(digit: str, colour: str, motion: str, place: str) -> jax.Array:
    row = (DIGITS.index(digit), COLOURS.index(colour), MOTIONS.index(motion), PLACES.index(place))
    return jnp.array([row], jnp.int32)


def paths(motion: str, number: int = 200) -> np.ndarray:
    """Corners (y, x) [number, frames, 2] of a motion."""
    index = jnp.full((number,), MOTIONS.index(motion), jnp.int32)
    return np.asarray(trajectories(jax.random.key(3), index))


def test_a_caption_names_colour_digit_motion_and_place():
    row = np.asarray(attributes("three", "red", "moving left", "flower"))[0]
    assert caption(row) == "a red three moving left over the flower"


def test_token_ids_end_and_pad():
    words = vocabulary()
    text = "a red three standing still over the cat"
    ids = token_ids(text)
    assert " ".join(list(words)[i] for i in ids[:9]) == f"{text} {EOS}"
    assert set(ids[9:]) == {words[PAD]}
    assert list(token_ids("")[:2]) == [words[EOS], words[PAD]]
    assert token_ids("a mauve three")[1] == words[UNKNOWN]


def test_every_caption_has_its_own_tokens_and_no_unknown_word():
    table = caption_table()
    assert table.shape == (*NUM_ANSWERS, 16)
    assert len(np.unique(table.reshape(-1, 16), axis=0)) == np.prod(NUM_ANSWERS)
    assert vocabulary()[UNKNOWN] not in table


def test_attributes_are_within_their_questions():
    drawn = np.asarray(draw_attributes(jax.random.key(0), 4000))
    for column, number in zip(drawn.T, NUM_ANSWERS, strict=True):
        assert set(column) == set(range(number))


@pytest.mark.parametrize("number", [16, 128])
def test_evaluation_captions_are_balanced_and_fixed_by_their_seed(number):
    drawn = balanced_attributes(5, number)
    for column, answers in zip(drawn.T, NUM_ANSWERS, strict=True):
        counts = np.bincount(column, minlength=answers)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(drawn, balanced_attributes(5, number))
    assert (drawn != balanced_attributes(6, number)).any()


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_digit_stays_in_the_picture(motion):
    corner = paths(motion)
    assert corner.min() >= -2.001  # two empty columns of the sprite may leave it
    assert corner[..., 0].max() <= HEIGHT - 24 + 2.001
    assert corner[..., 1].max() <= WIDTH - 24 + 2.001


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 1, -1), ("moving right", 1, 1), ("moving up", 0, -1), ("moving down", 0, 1)],
)
def test_straight_motions_go_their_way_and_no_other(motion, axis, sign):
    steps = np.diff(paths(motion), axis=1)
    assert (sign * steps[..., axis] > 0).all()
    np.testing.assert_allclose(steps[..., 1 - axis], 0, atol=1e-4)
    room = (HEIGHT, WIDTH)[axis] - 24 + 4
    travel = np.abs(steps[..., axis].sum(axis=1)) / room
    assert 0.599 <= travel.min() < 0.65
    assert 0.9 < travel.max() <= 0.951


def test_diagonal_goes_along_both_axes_into_all_four_corners():
    steps = np.diff(paths("moving diagonally"), axis=1)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], steps.shape), atol=1e-3)
    assert len({tuple(corner) for corner in np.sign(steps[:, 0])}) == 4


def test_bouncing_hops_from_the_floor_while_it_drifts():
    corner = paths("bouncing")
    turns = (np.diff(np.sign(np.diff(corner[..., 0], axis=1)), axis=1) != 0).sum(axis=1)
    assert turns.min() >= 2  # one and a half hops
    assert (np.ptp(corner[..., 0], axis=1) > 0.75 * 0.45 * (HEIGHT - 24 + 8)).all()
    assert (np.abs(np.diff(corner[..., 1], axis=1)) > 0.2).all()


def test_circling_comes_round_once():
    corner = paths("circling")
    centre = corner.mean(axis=1, keepdims=True)  # of a whole turn in equal steps
    angle = np.unwrap(np.arctan2(*np.moveaxis(corner - centre, -1, 0)), axis=1)
    np.testing.assert_allclose(np.abs(angle[:, -1] - angle[:, 0]), 2 * np.pi * 15 / 16, atol=0.15)


def test_standing_still_does():
    corner = paths("standing still")
    np.testing.assert_array_equal(corner, np.broadcast_to(corner[:, :1], corner.shape))


def test_videos_show_a_standing_background_and_a_digit_of_its_colour():
    drawn = attributes("eight", "cyan", "moving right", "coffee")
    video = make_videos(jax.random.key(1), load_assets(), drawn)
    pixels, digit = np.asarray(video.pixels)[0], np.asarray(video.digit)[0, :, 0]
    assert pixels.shape == (NUM_FRAMES, 3, HEIGHT, WIDTH)
    assert digit.shape == (NUM_FRAMES, HEIGHT, WIDTH)
    assert np.abs(pixels).max() <= 1 + 1e-5

    background = digit == 0
    both = background[0] & background[-1]
    np.testing.assert_array_equal(pixels[0][:, both], pixels[-1][:, both])
    colour = RGB[COLOURS.index("cyan")] / 127.5 - 1
    distance = np.abs(pixels - colour[None, :, None, None]).max(axis=1)
    assert ((distance < 0.02).sum(axis=(1, 2)) > 40).all()


def test_the_background_is_a_crop_of_its_photograph():
    drawn = attributes("one", "red", "standing still", "rocket")
    assets = load_assets()
    video = make_videos(jax.random.key(2), assets, drawn)
    pixels = np.moveaxis(np.asarray(video.pixels)[0, 0], 0, -1)
    background = np.asarray(video.digit)[0, 0, 0] == 0
    crops = np.asarray(assets.backgrounds[PLACES.index("rocket")]) / 127.5 - 1
    assert np.abs(crops - pixels)[:, background].max(axis=(1, 2)).min() < 1e-5


def test_the_same_key_gives_the_same_videos_and_another_key_others():
    drawn = draw_attributes(jax.random.key(0), 3)
    assets = load_assets()
    one, same, other = (make_videos(jax.random.key(k), assets, drawn).pixels for k in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert (np.asarray(one) != np.asarray(other)).any(axis=(1, 2, 3, 4)).all()

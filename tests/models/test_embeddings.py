"""Embeddings of times and positions: laws, and the tables of the released code."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_3d_sincos_pos_embed, get_timestep_embedding
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5Attention

from svg_jax.models.embeddings import sincos_video_embedding, sinusoidal_embedding
from svg_jax.models.rope import cropped_grid, rotate, video_rotation
from svg_jax.models.t5 import distance_buckets

sizes = st.integers(1, 60)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_sinusoids_of_all_times_equal_diffusers(dtype):
    times = np.array([*range(1000), 3500, 6016])  # the last is a guidance scale of 6 in bfloat16
    reference = get_timestep_embedding(
        torch.tensor(times), 128, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    ours = sinusoidal_embedding(jnp.asarray(times, dtype), 128)
    # The last bit of a frequency counts as often as the time says.
    last_bit = 2**-24 * times[:, None]
    assert (np.abs(ours - reference.numpy()) <= last_bit + 2e-7).all()
    # Exponentials with more than one wrong bit would show in many features.
    assert np.mean(np.abs(ours - reference.numpy()) > 1e-6) < 0.03


@pytest.mark.parametrize("size", [(1, 1, 1), (13, 30, 45), (4, 7, 5)])
def test_sincos_positions_equal_diffusers(size):
    frames, height, width = size
    reference = get_3d_sincos_pos_embed(32, (width, height), frames, 1.875, 1.5)
    ours = sincos_video_embedding(
        frames, height, width, 32, spatial_scale=1.875, temporal_scale=1.5
    )
    np.testing.assert_allclose(ours, reference.flatten(0, 1), atol=5e-6)


@given(sizes, sizes, sizes, sizes)
def test_cropped_grids_equal_diffusers(rows, columns, base_rows, base_columns):
    start, stop = get_resize_crop_region_for_grid((rows, columns), base_columns, base_rows)
    ours = cropped_grid((rows, columns), (base_rows, base_columns))
    for positions, size, first, end in zip(ours, (rows, columns), start, stop, strict=True):
        reference = torch.linspace(first, end * (size - 1) / size, size)
        np.testing.assert_allclose(positions, reference, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "patch_size_t"),
    [
        ((13, 30, 45), None),
        ((2, 20, 45), None),
        ((2, 31, 16), None),
        ((1, 3, 1), None),
        ((11, 30, 45), 2),
        ((2, 5, 60), 2),
    ],
)
def test_rotations_equal_those_of_the_diffusers_pipeline(size, patch_size_t):
    frames, rows, columns = size
    transformer = SimpleNamespace(
        config=SimpleNamespace(
            patch_size=2,
            patch_size_t=patch_size_t,
            attention_head_dim=32,
            sample_height=120 if patch_size_t else 60,
            sample_width=120 if patch_size_t else 90,
        )
    )
    pipeline: Any = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8)
    cos, sin = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, 16 * rows, 16 * columns, frames * (patch_size_t or 1), torch.device("cpu")
    )
    grid = (np.arange(rows), np.arange(columns))
    if patch_size_t is None:
        grid = cropped_grid((rows, columns), (30, 45))
    ours = video_rotation((np.arange(frames), *grid), (8, 12, 12), text_tokens=3)
    for table, reference, at_rest in ((ours.cos, cos, 1.0), (ours.sin, sin, 0.0)):
        np.testing.assert_array_equal(table[:3], at_rest)
        np.testing.assert_allclose(table[3:], reference[:, ::2], atol=1e-5)
        np.testing.assert_array_equal(reference[:, ::2], reference[:, 1::2])


def test_the_training_grid_stands_at_whole_numbers():
    rows, columns = cropped_grid((30, 45), (30, 45))
    np.testing.assert_allclose(rows, np.arange(30), atol=1e-12)
    np.testing.assert_allclose(columns, np.arange(45), atol=1e-12)


def test_text_is_not_turned_wherever_it_stands():
    positions = [np.arange(2), np.arange(3), np.arange(1)]
    alone = video_rotation(positions, (8, 12, 12))
    turned = partial(video_rotation, positions, (8, 12, 12), text_tokens=4)
    for beside, video, text in (
        (turned(), slice(4, 10), slice(0, 4)),
        (turned(text_position="last"), slice(6), slice(6, 10)),
    ):
        for table, of_video, at_rest in zip(beside, alone, (1.0, 0.0), strict=True):
            np.testing.assert_array_equal(table[video], of_video)
            np.testing.assert_array_equal(table[text], np.full((4, 16), at_rest))


def test_a_rotated_product_depends_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 32))
    products = {}

    def turn(x, place):
        return rotate(x, video_rotation([np.array([place])] * 3, (8, 12, 12)))

    for first in range(6):
        for second in range(6):
            turned = turn(query, first), turn(key, second)
            np.testing.assert_allclose(*map(jnp.linalg.norm, (turned[0], query)), rtol=1e-6)
            products.setdefault(first - second, []).append(jnp.sum(turned[0] * turned[1]))
    for same in products.values():
        np.testing.assert_allclose(same, same[0], atol=1e-5)
    assert np.std([same[0] for same in products.values()]) > 0.1


def test_rotation_keeps_the_dtype():
    rotation = video_rotation((np.arange(2), np.arange(1), np.arange(1)), (8, 12, 12))
    assert rotate(jnp.ones((1, 2, 1, 32), jnp.bfloat16), rotation).dtype == jnp.bfloat16


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 128), (32, 64), (8, 20)])
def test_distance_buckets_equal_transformers_at_every_distance(num_buckets, max_distance):
    ours = distance_buckets(600, num_buckets, max_distance)
    position = torch.arange(600)
    reference = T5Attention._relative_position_bucket(
        position[None, :] - position[:, None],
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    np.testing.assert_array_equal(ours, reference)
    assert ours.min() == 0
    assert ours.max() == num_buckets - 1

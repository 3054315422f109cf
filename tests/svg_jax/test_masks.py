"""From a density to the exact mask, for the three families of the paper."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg_jax.attention import sparse_attention
from svg_jax.config import (
    PAPER_PRESETS,
    SparsityConfig,
    Warmup,
    dense_layer_count,
    dense_step_count,
)
from svg_jax.masks import (
    band_width,
    realised_density,
    sparse_mask,
    text_share_of,
    warn_of_lost_sparsity,
)
from svg_jax.models import CogVideoXConfig, HunyuanVideoConfig, VideoLayout, WanConfig

INVENTORIES = Path(__file__).parents[2] / "inventories"

COGVIDEOX = VideoLayout(
    num_frames=11, tokens_per_frame=4080, text_tokens=226, text_position="first"
)
HUNYUANVIDEO = VideoLayout(num_frames=33, tokens_per_frame=3600, text_tokens=256)
WAN_720P = VideoLayout(num_frames=21, tokens_per_frame=3600)
WAN_480P = VideoLayout(num_frames=21, tokens_per_frame=1560)


@pytest.mark.parametrize(
    ("layout", "density", "width", "realised"),
    [
        (COGVIDEOX, 0.25, 5760, 0.248),
        (HUNYUANVIDEO, 0.25, 15616, 0.249),
        (WAN_720P, 0.30, 12416 + 1, 0.340),  # keeps |q − k| ≤ 12416; .302 and the sink
        (WAN_480P, 0.30, 5376 + 1, None),
    ],
)
def test_the_scripts_settings_realise_the_known_widths(layout, density, width, realised):
    mask = sparse_mask(layout, SparsityConfig(density=density))
    assert mask.band_width == width
    if realised:
        assert float(realised_density(mask)) == pytest.approx(realised, abs=5e-4)


def test_the_sink_comes_on_top_of_the_budget():
    config = SparsityConfig(density=0.30, first_frame_sink=False)
    assert float(realised_density(sparse_mask(WAN_720P, config))) == pytest.approx(0.302, abs=5e-4)


def specified_mask(layout: VideoLayout, width: int, text_length: int, rows=None) -> np.ndarray:
    """The three rows of the specification, written as they stand there, for some rows or all."""
    position = np.arange(layout.num_tokens)
    rows = position if rows is None else rows
    q, k = rows[:, None], position[None, :]
    if layout.text_tokens == 0:  # Wan
        return (np.abs(q - k) < width) | (k < layout.tokens_per_frame)
    if layout.text_position == "first":  # CogVideoX, whose text is never padded
        return (q < layout.text_tokens) | (k < layout.text_tokens) | (np.abs(q - k) < width)
    stop = layout.video_tokens + text_length  # HunyuanVideo
    is_text = (q >= layout.video_tokens) | (k >= layout.video_tokens)
    return (q < stop) & (k < stop) & ((np.abs(q - k) < width) | is_text)


@st.composite
def layouts(draw):
    family = draw(st.sampled_from(["cogvideox", "hunyuanvideo", "wan"]))
    return VideoLayout(
        num_frames=draw(st.integers(1, 5)),
        tokens_per_frame=draw(st.integers(2, 13)),
        text_tokens=0 if family == "wan" else draw(st.integers(1, 7)),
        text_position="first" if family == "cogvideox" else "last",
    )


@given(layouts(), st.floats(0.01, 1.0), st.sampled_from([1, 4, 128]), st.data())
def test_the_closed_form_is_the_specified_mask(layout, density, multiple, data):
    config = SparsityConfig(density=density, band_multiple=multiple)
    if density <= text_share_of(layout):
        return
    mask = sparse_mask(layout, config)
    padded = layout.text_tokens > 0 and layout.text_position == "last"
    length = data.draw(st.integers(0, layout.text_tokens)) if padded else layout.text_tokens
    position = np.arange(layout.num_tokens)
    kept = mask.keep(position[:, None], position[None, :], np.asarray(length))
    expected = specified_mask(layout, mask.band_width, length)
    np.testing.assert_array_equal(kept, expected)

    real = layout.video_tokens + length
    if density >= 1:
        assert kept.sum() == real * real
    assert kept[position < real].any(axis=1).all(), "no real row is ever left empty"
    computed = realised_density(mask, jnp.array([length], jnp.int32))
    assert float(computed) == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("inventory", "config", "size", "text", "length", "preset"),
    [
        ("cogvideox-1.5-5b", CogVideoXConfig, (22, 96, 170), 226, 226, "cogvideox1.5-i2v"),
        ("hunyuanvideo-t2v", HunyuanVideoConfig, (33, 90, 160), 256, 71, "hunyuanvideo-720p"),
        ("hunyuanvideo-i2v-16ch", HunyuanVideoConfig, (33, 90, 160), 396, 200, "hunyuanvideo-720p"),
        ("wan2.1-t2v-14b", WanConfig, (21, 90, 160), None, 0, "wan-t2v-720p"),
        ("wan2.1-t2v-1.3b", WanConfig, (21, 60, 104), None, 0, "wan-i2v-480p"),
    ],
)
def test_released_models_run_the_specified_mask_at_full_size(
    inventory, config, size, text, length, preset
):
    released = json.loads((INVENTORIES / f"{inventory}-transformer.json").read_text())["config"]
    layout = config.from_dict(released).layout(*size, *([] if text is None else [text]))
    settings = PAPER_PRESETS[preset].sparsity
    mask = sparse_mask(layout, settings)
    share = settings.density - 2 * layout.text_tokens / layout.num_tokens
    exact = layout.num_tokens * (1 - math.sqrt(1 - share))
    width = 128 * math.floor(exact / 128) if text else 128 * math.ceil(exact / 128) + 1
    edges = [0, layout.text_tokens, layout.video_tokens, layout.video_tokens + length]
    rows = np.random.default_rng(0).integers(0, layout.num_tokens, 40)
    rows = np.concatenate([rows, [r for e in edges for r in (e - 1, e, e + 1)]])
    rows = rows[(rows >= 0) & (rows < layout.num_tokens)]
    kept = mask.keep(rows[:, None], np.arange(layout.num_tokens)[None], np.asarray(length))
    np.testing.assert_array_equal(kept, specified_mask(layout, width, length, rows))


@given(layouts(), st.integers(1, 40))
def test_the_unrounded_band_spends_no_more_than_the_density_and_nearly_all_of_it(layout, percent):
    density = percent / 40
    if density <= 2 * layout.text_tokens / layout.num_tokens:
        return
    config = SparsityConfig(density=density, band_multiple=1, first_frame_sink=False)
    width = band_width(layout, config)
    exact = layout.num_tokens * (
        1 - math.sqrt(1 - min(density - 2 * layout.text_tokens / layout.num_tokens, 1))
    )
    assert density >= 1 or abs(width - exact) <= 2
    assert 1 <= width <= layout.num_tokens


def test_a_width_that_rounds_to_nothing_is_kept_unrounded():
    layout = VideoLayout(num_frames=4, tokens_per_frame=64, text_tokens=16, text_position="first")
    assert band_width(layout, SparsityConfig(density=0.25)) == math.ceil(
        272 * (1 - math.sqrt(1 - (0.25 - 32 / 272)))
    )


@pytest.mark.parametrize(("frames", "text"), [(4, 4), (1, 12)])  # text is 1/5 of the tokens, 3/4
def test_a_density_that_the_text_eats_up_names_the_smallest_that_works(frames, text):
    layout = VideoLayout(num_frames=frames, tokens_per_frame=4, text_tokens=text)
    position = np.arange(layout.num_tokens)
    is_text = position >= layout.text_start
    share = (is_text[:, None] | is_text[None]).mean()
    with pytest.raises(ValueError, match="the smallest density that works is") as error:
        band_width(layout, SparsityConfig(density=share))
    (found,) = re.findall(r"works is (\S+),", str(error.value))
    smallest = float(found)
    assert share < smallest <= share + 1e-4
    for density in (smallest, (smallest + 2 * text / layout.num_tokens) / 2):
        if density < 1:
            assert band_width(layout, SparsityConfig(density=density)) == 1


def test_a_mask_that_saves_next_to_nothing_is_told_once_with_the_density_that_is_computed(caplog):
    wan, hunyuan = VideoLayout(4, 25), VideoLayout(1, 48, text_tokens=8)
    with_sink = SparsityConfig(density=0.35, first_frame_sink=True)
    for layout, config in ((wan, SparsityConfig(density=0.3)), (hunyuan, with_sink)):
        caplog.clear()
        for sampled_rows in (32, 64):
            warn_of_lost_sparsity(layout, dataclasses.replace(config, sampled_rows=sampled_rows))
        (sentence,) = caplog.messages
        kept = float(realised_density(sparse_mask(layout, config)))
        assert f"density {config.density} was asked for, but {kept:.4f} is computed" in sentence
    caplog.clear()
    for layout, config in (
        (hunyuan, SparsityConfig(density=0.35)),
        (wan, SparsityConfig(density=0.3, band_multiple=1)),
        (wan, SparsityConfig(density=1)),
        (WAN_720P, PAPER_PRESETS["wan-t2v-720p"].sparsity),
    ):
        warn_of_lost_sparsity(layout, config)
    assert not caplog.messages


def test_sparse_attention_tells_of_lost_sparsity_too(caplog):
    layout = VideoLayout(num_frames=2, tokens_per_frame=9)
    query = jnp.zeros((1, 18, 1, 8))
    sparse_attention(
        query, query, query, layout=layout, config=SparsityConfig(), rng=jax.random.key(0)
    )
    (sentence,) = caplog.messages
    assert "1.0000 is computed" in sentence


def test_the_model_tells_its_rule_and_a_layout_of_ones_own_is_taken_at_its_word():
    wan, with_text = WanConfig(), VideoLayout(4, 256, text_tokens=8)
    assert (with_text.band_rounding, with_text.first_frame_sink) == ("down", False)
    assert wan.layout(4, 32, 32) == VideoLayout(4, 256, band_rounding="up", first_frame_sink=True)
    for config in (CogVideoXConfig(), HunyuanVideoConfig()):
        layout = config.layout(4, 32, 32, 8)
        assert (layout.band_rounding, layout.first_frame_sink) == ("down", False)
    config = SparsityConfig(density=0.3)
    # 1024·(1 − √0.7) is 167.3, and 1032·(1 − √(0.7 + 16/1032)) is 159.
    for rounding, alone, beside_text in (("down", 128, 128), ("up", 257, 257)):
        own: Any = {"band_rounding": rounding, "first_frame_sink": False}
        assert band_width(VideoLayout(4, 256, **own), config) == alone
        assert band_width(VideoLayout(4, 256, 8, **own), config) == beside_text
    sink = VideoLayout(4, 256, 8, "first", first_frame_sink=True)
    assert sparse_mask(sink, config).sink_tokens == 8 + 256
    no_sink = dataclasses.replace(config, first_frame_sink=False)
    assert sparse_mask(sink, no_sink).sink_tokens == 0
    without = VideoLayout(4, 256, first_frame_sink=False)
    assert sparse_mask(without, config).sink_tokens == 0


def test_warm_up_counts_are_floors_that_forgive_rounding():
    warmup = Warmup(steps=0.3, layers=0.03)
    assert dense_step_count(warmup, 10) == 3  # .3·10 is 2.999…
    assert dense_step_count(warmup, 50) == 15
    assert dense_layer_count(warmup, 42) == 1
    assert dense_layer_count(warmup, 30) == 0


@pytest.mark.parametrize(
    ("share", "steps", "dense"),
    [(0.2, 4, 1), (0.04, 20, 1), (1e-9, 50, 1), (0.2, 1, 1), (0.2, 0, 0), (0, 4, 0), (1, 4, 4)],
)
def test_a_warm_up_is_at_least_one_step(share, steps, dense):
    assert dense_step_count(Warmup(steps=share), steps) == dense

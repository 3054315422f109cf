"""The judge of the tiny model, and the report that is made with it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.append(str(Path(__file__).parents[2] / "examples"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import tiny_quality
from tiny_data import HEIGHT, NUM_ANSWERS, NUM_FRAMES, WIDTH, load_assets
from tiny_judge import Accuracies, Judge, judge_videos, neighbours, patches, train_judge

from svg_jax.convert import convert_pipeline
from svg_jax.sampling import CogVideoXPipeline, from_pretrained


def test_patches_hold_the_squares_of_a_picture():
    picture = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    squares = patches(picture, 2)
    np.testing.assert_array_equal(squares[1, 1, 2], picture[1, 2:4, 4:6].reshape(-1))


def test_a_linear_of_neighbours_is_a_convolution():
    picture = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 7))
    convolved = jax.lax.conv_general_dilated(
        picture, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        neighbours(picture) @ kernel.reshape(27, 7), convolved, rtol=1e-4, atol=1e-4
    )


def test_the_judge_answers_every_question():
    logits = Judge(8, rngs=nnx.Rngs(0))(jnp.zeros((2, NUM_FRAMES, 3, HEIGHT, WIDTH)))
    assert [answer.shape for answer in logits] == [(2, number) for number in NUM_ANSWERS]


def test_accuracies_count_each_question_and_all_at_once():
    class Fixed(nnx.Module):
        """Answers 0, 1, 2 and 3, whatever it sees."""

        def __call__(self, pixels):
            return [
                jnp.broadcast_to(jax.nn.one_hot(answer, number)[None], (len(pixels), number))
                for answer, number in enumerate(NUM_ANSWERS)
            ]

    pixels = np.zeros((3, 1, 1, 1, 1), np.float32)
    attributes = np.array([[0, 1, 2, 3], [0, 1, 2, 0], [1, 1, 2, 3]])
    found = judge_videos(Fixed(), pixels, attributes, batch=2)  # pyright: ignore
    assert found.as_dict() == pytest.approx(
        {"digit": 2 / 3, "colour": 1, "motion": 1, "place": 2 / 3, "all four": 1 / 3}
    )
    assert isinstance(found, Accuracies)


@pytest.mark.slow
def test_training_stops_after_its_steps_with_weights_that_moved():
    sizes = {"batch": 2, "max_steps": 4, "steps_per_call": 2, "width": 8}
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        judge, steps = train_judge(jax.random.key(0), load_assets(), seconds=600, **sizes)
    assert steps == 4
    init_rng, _ = jax.random.split(jax.random.key(0))
    first = nnx.state(Judge(8, rngs=nnx.Rngs(init_rng)))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), nnx.state(judge), first)
    assert all(0 < distance < 0.1 for distance in jax.tree.leaves(moved))


def test_the_report_gives_mean_and_standard_error():
    found = tiny_quality._mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found == {"mean": 2.5, "standard error": pytest.approx(np.sqrt(5 / 3) / 2, abs=1e-4)}


def test_the_contact_sheet_stacks_the_methods_of_each_video():
    videos = {
        name: np.full((2, 4, 3, 8, 12), level, np.float32)
        for name, level in (("dense", -1), ("svg", 1), ("random labels", 0))
    }
    sheet = np.asarray(tiny_quality.contact_sheet(["one", "two"], videos, number=2, enlarge=2))
    assert sheet.shape == (2 * 2 * (16 + 13), 2 * (24 + 2) - 2, 3)
    rows = sheet[:, 0, 0].reshape(4, 29)[:, -1]
    assert rows.tolist() == [0, 255, 0, 255]  # dense above SVG, twice; no row of random labels


def test_the_pipeline_of_the_report_is_the_converted_one(tmp_path):
    folder = tiny_quality.ROOT / "svg_jax/assets/tiny_cogvideox"
    convert_pipeline(folder, tmp_path / "model")
    ours, converted = tiny_quality.load_pipeline(folder), from_pretrained(tmp_path / "model")
    assert isinstance(converted, CogVideoXPipeline)
    for name in ("transformer", "text_encoder"):
        modules = getattr(ours, name), getattr(converted, name).load()
        one, other = (nnx.to_pure_dict(nnx.state(module)) for module in modules)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert ours.scheduler == converted.scheduler
    assert ours.has_vae == converted.has_vae

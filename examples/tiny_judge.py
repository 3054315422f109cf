"""The judge of the tiny model: a small network that names digit, colour, motion and place.

It is trained on the same generator as the model, for seconds, and never sees a generated video.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray
from tiny_data import (
    HEIGHT,
    NUM_ANSWERS,
    NUM_FRAMES,
    QUESTIONS,
    WIDTH,
    Assets,
    draw_attributes,
    make_videos,
)

PATCH = 4  # pixels
NOISE = 0.1  # standard deviation of the noise on its training videos, whose range is -1..1


class Judge(nnx.Module):
    """Logits of the four questions: patches and their neighbours by frame, then all frames."""

    def __init__(self, width: int = 128, *, rngs: nnx.Rngs):
        # Convolutions written as matrix products: a CPU trains them too.
        self.near = nnx.Linear(9 * 3 * PATCH**2, width, rngs=rngs)
        self.far = nnx.Linear(9 * width, width, rngs=rngs)
        self.merge = nnx.Linear(4 * width, width, rngs=rngs)
        grid = (HEIGHT // PATCH // 2) * (WIDTH // PATCH // 2)
        self.frame = nnx.Linear(grid * width, width, rngs=rngs)
        self.video = nnx.Linear(NUM_FRAMES * width, 2 * width, rngs=rngs)
        self.answers = nnx.Linear(2 * width, sum(NUM_ANSWERS), rngs=rngs)

    def __call__(
        self, pixels: Float[Array, "batch frames 3 height width"]
    ) -> list[Float[Array, "batch answers"]]:
        """Logits of each question of tiny_data.QUESTIONS, in that order."""
        batch, frames = pixels.shape[:2]
        hidden = jnp.moveaxis(pixels.reshape(batch * frames, *pixels.shape[2:]), 1, -1)
        hidden = nnx.gelu(self.near(neighbours(patches(hidden, PATCH))))
        hidden = nnx.gelu(self.far(neighbours(hidden)))
        hidden = nnx.gelu(self.merge(patches(hidden, 2)))
        hidden = nnx.gelu(self.frame(hidden.reshape(batch * frames, -1)))
        hidden = nnx.gelu(self.video(hidden.reshape(batch, -1)))
        return jnp.split(self.answers(hidden), np.cumsum(NUM_ANSWERS)[:-1], axis=-1)


def patches(
    x: Float[Array, "batch height width features"], size: int
) -> Float[Array, "batch rows columns patch_features"]:
    """Squares of `size` by `size` places, their features side by side."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, features)
    return jnp.moveaxis(x, 2, 3).reshape(batch, height // size, width // size, -1)


def neighbours(
    x: Float[Array, "batch height width features"],
) -> Float[Array, "batch height width nine_features"]:
    """Every place with its eight neighbours, zeros beyond the border."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


class Accuracies(NamedTuple):
    """Shares of right answers: one a question, all at once, and the same as a dict for reports."""

    each: Float[np.ndarray, " 4"]
    joint: float

    def as_dict(self) -> dict[str, float]:
        """By the questions' names, and "all four"."""
        return dict(zip(QUESTIONS, self.each.tolist(), strict=True)) | {"all four": self.joint}


def train_judge(
    rng: PRNGKeyArray,
    assets: Assets,
    *,
    seconds: float,
    batch: int = 128,
    max_steps: int = 6000,
    steps_per_call: int = 50,
    width: int = 128,
) -> tuple[Judge, int]:
    """Train a judge until the time is over or `max_steps` are done.

    Args:
        rng: Key of its initial weights, its videos and their noise.
        assets: Photographs and digits of the generator.
        seconds: Time to train for, compilation not counted.
        batch: Videos a step.
        max_steps: The learning rate falls to nothing by then (or by the end of the time).
        steps_per_call: Steps in one device call.
        width: Features of the judge's hidden layers.

    Returns:
        The judge, and the number of steps that it was trained for.
    """
    init_rng, data_rng = jax.random.split(rng)
    graph, parameters = nnx.split(Judge(width, rngs=nnx.Rngs(init_rng)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98))

    def loss(parameters: nnx.State, rng: PRNGKeyArray) -> Float[Array, ""]:
        attribute_rng, video_rng, noise_rng = jax.random.split(rng, 3)
        attributes = draw_attributes(attribute_rng, batch)
        pixels = make_videos(video_rng, assets, attributes).pixels
        pixels = pixels + NOISE * jax.random.normal(noise_rng, pixels.shape)
        logits = nnx.merge(graph, parameters)(pixels)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(answer, attributes[:, question]).mean()
            for question, answer in enumerate(logits)
        ]
        return jnp.stack(losses).sum()

    @jax.jit
    def train(carry, first_step, learning_rate):
        def step(carry, index):
            parameters, state = carry
            value, gradient = jax.value_and_grad(loss)(
                parameters, jax.random.fold_in(data_rng, first_step + index)
            )
            updates, state = optimizer.update(gradient, state)
            updates = jax.tree.map(lambda update: -learning_rate * update, updates)
            return (optax.apply_updates(parameters, updates), state), value

        return jax.lax.scan(step, carry, jnp.arange(steps_per_call))

    carry = (parameters, optimizer.init(parameters))
    train = train.lower(carry, jnp.int32(0), jnp.float32(0)).compile()  # pyright: ignore
    started, steps, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        rate = 1e-3 * min(1.0, 2.0 * (1.0 - progress), (steps + 1) / (2 * steps_per_call))
        carry, values = train(carry, jnp.int32(steps), jnp.float32(rate))
        values.block_until_ready()
        steps += steps_per_call
        progress = max((time.monotonic() - started) / seconds, steps / max_steps)
    return nnx.merge(graph, carry[0]), steps


def judge_videos(
    judge: Judge,
    pixels: Float[np.ndarray, "videos frames 3 height width"],
    attributes: np.ndarray,
    batch: int = 64,
) -> Accuracies:
    """How many of the videos show what their captions say.

    Args:
        judge: From `train_judge`.
        pixels: Videos, -1..1.
        attributes: What each should show: int [videos, 4].
        batch: Videos judged at once.

    Returns:
        The shares that are right.
    """
    graph, parameters = nnx.split(judge)
    answer = jax.jit(lambda parameters, videos: nnx.merge(graph, parameters)(videos))
    right = []
    for start in range(0, len(pixels), batch):
        logits = answer(parameters, jnp.asarray(pixels[start : start + batch], jnp.float32))
        named = np.stack([np.argmax(one, axis=-1) for one in logits], axis=-1)
        right.append(named == attributes[start : start + batch])
    right = np.concatenate(right)
    return Accuracies(right.mean(axis=0), float(right.all(axis=1).mean()))

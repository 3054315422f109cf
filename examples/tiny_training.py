"""Training the tiny model: a jitted scan of steps that makes its own data; its state on disk."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, PRNGKeyArray
from optax.contrib import MuonDimensionNumbers, muon
from tiny_data import Assets, caption_table, draw_attributes, make_videos, token_ids
from tiny_model import make_text_encoder, make_transformer, signal_and_noise

Parameters = dict[str, Any]  # {"transformer": ..., "text_encoder": ...}, nested, float32

MUON_RATE, ADAM_RATE = 4e-3, 1e-3
AVERAGE_DECAY = 0.999
CAPTION_DROPOUT = 0.1
WARM_UP_STEPS = 200
COARSE_UNTIL = 0.4  # share of the training in which the digit counts more and the rate is constant
DIGIT_WEIGHT = 3.0
LAST_RATE = 0.02
NUM_EIGHTHS = 8


class TrainState(NamedTuple):
    """All that a training step changes."""

    step: Int[Array, ""]
    parameters: Parameters
    average: Parameters
    optimizer: optax.OptState


class Batch(NamedTuple):
    """One batch of the v-prediction task; digit: see tiny_data.Videos."""

    noisy: Float[Array, "batch frames channels height width"]
    velocity: Float[Array, "batch frames channels height width"]
    digit: Float[Array, "batch frames 1 height width"]
    timestep: Int[Array, " batch"]
    tokens: Int[Array, "batch 16"]


class TinyTrainer:
    """What training does not change: the networks' structure, the task, the optimizer."""

    def __init__(
        self,
        assets: Assets,
        transformer: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
        *,
        batch: int = 32,
        dtype: Dtype = jnp.bfloat16,
        seed: int = 0,
    ):
        self.assets, self.batch, self.seed = assets, batch, seed
        signal, noise = signal_and_noise()
        self.signal, self.noise = jnp.asarray(signal), jnp.asarray(noise)
        self.captions = jnp.asarray(caption_table())
        self.no_caption = jnp.asarray(token_ids(""))
        self.optimizer = make_optimizer()
        rngs = nnx.Rngs(seed)
        networks = {
            "transformer": make_transformer(rngs, dict(transformer), dtype),
            "text_encoder": make_text_encoder(rngs, dict(text_encoder), dtype),
        }
        self.graphs, self._initial = {}, {}
        for name, network in networks.items():
            self.graphs[name], state = nnx.split(network)
            self._initial[name] = nnx.to_pure_dict(state)

    def initial_state(self) -> TrainState:
        """Fresh parameters, the optimizer's zeros."""
        parameters = jax.tree.map(jnp.copy, self._initial)  # `train` consumes its state
        optimizer = self.optimizer.init(parameters)
        average = jax.tree.map(jnp.copy, parameters)
        return TrainState(jnp.int32(0), parameters, average, optimizer)

    def networks(self, parameters: Parameters) -> dict[str, nnx.Module]:
        """The transformer and the text encoder with these parameters."""
        return {name: nnx.merge(graph, parameters[name]) for name, graph in self.graphs.items()}

    def draw_batch(self, rng: PRNGKeyArray, timestep: Int[Array, " batch"]) -> Batch:
        """Videos noised to the given timesteps, one in ten without its caption."""
        attribute_rng, video_rng, noise_rng, drop_rng = jax.random.split(rng, 4)
        attributes = draw_attributes(attribute_rng, len(timestep))
        videos = make_videos(video_rng, self.assets, attributes)
        noise = jax.random.normal(noise_rng, videos.pixels.shape)
        a = self.signal[timestep][:, None, None, None, None]
        b = self.noise[timestep][:, None, None, None, None]
        tokens = self.captions[tuple(attributes.T)]
        drop = jax.random.bernoulli(drop_rng, CAPTION_DROPOUT, (len(timestep), 1))
        return Batch(
            noisy=a * videos.pixels + b * noise,
            velocity=a * noise - b * videos.pixels,
            digit=videos.digit,
            timestep=timestep,
            tokens=jnp.where(drop, self.no_caption[None], tokens),
        )

    def squared_error(
        self, parameters: Parameters, batch: Batch, *, remat: bool = False
    ) -> Float[Array, "batch frames channels height width"]:
        """Squared error of the predicted velocity."""
        networks = self.networks(parameters)
        text = networks["text_encoder"](batch.tokens)
        velocity, _ = networks["transformer"](batch.noisy, text, batch.timestep, remat=remat)
        return jnp.square(velocity.astype(jnp.float32) - batch.velocity)

    def train_step(
        self, state: TrainState, progress: Float[Array, ""]
    ) -> tuple[TrainState, Float[Array, ""]]:
        """One step at `progress` (0..1) of the whole training; returns the state and the loss."""
        rng = jax.random.fold_in(jax.random.key(self.seed), state.step)
        time_rng, batch_rng = jax.random.split(rng)
        batch = self.draw_batch(batch_rng, draw_timesteps(time_rng, self.batch))
        coarse = progress < COARSE_UNTIL
        weight = 1.0 + jnp.where(coarse, DIGIT_WEIGHT - 1.0, 0.0) * batch.digit

        def loss(parameters: Parameters) -> Float[Array, ""]:
            error = self.squared_error(parameters, batch, remat=True)
            return jnp.mean(error * weight) / jnp.mean(weight)

        value, gradient = jax.value_and_grad(loss)(state.parameters)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.parameters)
        rate = learning_rate(progress, state.step)
        parameters = jax.tree.map(lambda p, u: p + rate * u, state.parameters, updates)
        decay = jnp.minimum(AVERAGE_DECAY, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), state.average, parameters)
        return TrainState(state.step + 1, parameters, average, optimizer), value

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def train(
        self, state: TrainState, progress: Float[Array, " steps"]
    ) -> tuple[TrainState, Float[Array, " steps"]]:
        """Many steps in one device call."""
        return jax.lax.scan(self.train_step, state, progress)

    @partial(jax.jit, static_argnums=0, static_argnames=("batches", "batch"))
    def validate(
        self, parameters: Parameters, *, batches: int = 4, batch: int = 32
    ) -> Float[Array, "eighths"]:
        """Mean loss in each eighth of the timesteps, on the same fresh videos each time."""

        def eighth_loss(_: None, index: Int[Array, ""]) -> tuple[None, Float[Array, ""]]:
            rng = jax.random.fold_in(jax.random.key(self.seed + 1), index)
            time_rng, batch_rng = jax.random.split(rng)
            size = len(self.signal) // NUM_EIGHTHS
            timestep = index % NUM_EIGHTHS * size + jax.random.randint(time_rng, (batch,), 0, size)
            error = self.squared_error(parameters, self.draw_batch(batch_rng, timestep))
            return None, jnp.mean(error)

        _, losses = jax.lax.scan(eighth_loss, None, jnp.arange(batches * NUM_EIGHTHS))
        return jnp.mean(losses.reshape(batches, NUM_EIGHTHS), axis=0)


def draw_timesteps(rng: PRNGKeyArray, batch: int) -> Int[Array, " batch"]:
    """Half uniform, half from the middle and the end, where motion and layout are decided."""
    pick_rng, time_rng = jax.random.split(rng)
    time = jax.random.uniform(time_rng, (batch,))
    late = jax.random.bernoulli(pick_rng, 0.5, (batch,))
    return jnp.floor(1000.0 * jnp.where(late, 0.35 + 0.65 * time, time)).astype(jnp.int32)


def learning_rate(progress: Float[Array, ""], step: Int[Array, ""]) -> Float[Array, ""]:
    """Factor on both optimizers' rates: a warm-up, constant, then a cosine down to LAST_RATE."""
    along = jnp.clip((progress - COARSE_UNTIL) / (1.0 - COARSE_UNTIL), 0.0, 1.0)
    cosine = LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + jnp.cos(jnp.pi * along))
    return cosine * jnp.minimum(1.0, (step + 1) / WARM_UP_STEPS)


def make_optimizer() -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, Adam for the rest, behind a clip of the global norm."""

    def matrices(parameters: Parameters) -> Any:
        """Which axes make a matrix; None for what is left to Adam. Layers are stacked in front."""

        def axes(path: tuple[Any, ...], leaf: Array) -> MuonDimensionNumbers | None:
            in_blocks = any(getattr(entry, "key", None) == "blocks" for entry in path)
            in_transformer = getattr(path[0], "key", None) == "transformer"
            is_stacked_matrix = in_blocks and in_transformer and leaf.ndim == 3
            return MuonDimensionNumbers(1, 2) if is_stacked_matrix else None

        return jax.tree_util.tree_map_with_path(axes, parameters)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            MUON_RATE,
            beta=0.95,
            weight_decay=0.02,
            consistent_rms=0.2,
            adam_learning_rate=ADAM_RATE,
            adam_b1=0.9,
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrices,  # pyright: ignore[reportArgumentType]
        ),
    )


def save_state(folder: Path, state: TrainState, record: Mapping[str, Any]) -> None:
    """Write the state as three .npz files and the record (a JSON object) last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("parameters", "average", "optimizer"):
        leaves = jax.tree.leaves(getattr(state, name))
        arrays = {f"{number:04}": np.asarray(leaf) for number, leaf in enumerate(leaves)}
        partial_file = folder / f"{name}.partial.npz"
        np.savez(partial_file, **arrays)  # pyright: ignore[reportArgumentType]
        partial_file.rename(folder / f"{name}.npz")
    (folder / "record.json").write_text(json.dumps({**record, "step": int(state.step)}, indent=1))


def load_state(folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Read what `save_state` wrote.

    Args:
        folder: Where it is.
        like: A state of the same structure, whose arrays are replaced.

    Returns:
        The state and the record.

    Raises:
        ValueError: If an array is missing or of another shape.
    """
    record = json.loads((folder / "record.json").read_text())
    parts = {}
    for name in ("parameters", "average", "optimizer"):
        leaves, tree = jax.tree.flatten(getattr(like, name))
        with np.load(folder / f"{name}.npz") as arrays:
            loaded = [jnp.asarray(arrays[key]) for key in sorted(arrays.files)]
        if [leaf.shape for leaf in loaded] != [jnp.shape(leaf) for leaf in leaves]:
            raise ValueError(f"{folder / name}.npz is the state of another model")
        parts[name] = jax.tree.unflatten(tree, loaded)
    return TrainState(step=jnp.int32(record["step"]), **parts), record

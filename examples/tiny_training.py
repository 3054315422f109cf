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
from safetensors.numpy import load_file
from tiny_data import (
    CAPTION_TOKENS,
    HEIGHT,
    NUM_FRAMES,
    WIDTH,
    Assets,
    caption_table,
    draw_attributes,
    make_videos,
    token_ids,
)
from tiny_model import (
    TEXT_ENCODER,
    TRANSFORMER,
    make_text_encoder,
    make_transformer,
    signal_and_noise,
)

from svg_jax.convert.tables import cogvideox, t5
from svg_jax.convert.tables.rules import convert_state
from svg_jax.models.cogvideox import CogVideoXConfig, CogVideoXTransformer
from svg_jax.models.rope import Rotation
from svg_jax.models.t5 import T5Config

Parameters = dict[str, Any]  # {"transformer": ..., "text_encoder": ...}, nested, float32

MUON_RATE, ADAM_RATE = 4e-3, 1e-3
AVERAGE_DECAY = 0.999
CAPTION_DROPOUT = 0.1
WARM_UP_STEPS = 200
# The first phase sees COARSE_FRAMES of a video's frames, twice as many videos, and the digit counts
# more: it teaches what goes where, cheaply. The second sees whole videos, as sampling does.
COARSE_UNTIL = 0.6
COARSE_FRAMES = 8
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
    """One batch of the v-prediction task.

    Attributes:
        noisy: The videos, noised.
        velocity: What is to be predicted.
        digit: Index of the digit, as in tiny_data.Videos.
        timestep: How noisy each one is.
        tokens: Captions.
        frames: Which frames of the videos these are; None: all.
    """

    noisy: Float[Array, "batch frames channels height width"]
    velocity: Float[Array, "batch frames channels height width"]
    digit: Float[Array, "batch frames 1 height width"]
    timestep: Int[Array, " batch"]
    tokens: Int[Array, "batch 16"]
    frames: Int[Array, " frames"] | None = None


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

    def initial_state(self, parameters: Parameters | None = None) -> TrainState:
        """Begin with these parameters (None: fresh ones) and the optimizer's zeros."""
        # A copy, since `train` consumes its state.
        start = self._initial if parameters is None else parameters
        copied: Parameters = jax.tree.map(jnp.array, start)
        average = jax.tree.map(jnp.copy, copied)
        return TrainState(jnp.int32(0), copied, average, self.optimizer.init(copied))

    def networks(self, parameters: Parameters) -> dict[str, Any]:
        """Make the transformer and the text encoder with these parameters."""
        return {name: nnx.merge(graph, parameters[name]) for name, graph in self.graphs.items()}

    def draw_batch(
        self, rng: PRNGKeyArray, timestep: Int[Array, " batch"], *, coarse: bool = False
    ) -> Batch:
        """Videos, or some of their frames, noised to the timesteps; one in ten has no caption."""
        attribute_rng, video_rng, noise_rng, drop_rng, frame_rng = jax.random.split(rng, 5)
        attributes = draw_attributes(attribute_rng, len(timestep))
        videos = make_videos(video_rng, self.assets, attributes)
        frames = draw_frames(frame_rng) if coarse else None
        if frames is not None:
            videos = videos._replace(pixels=videos.pixels[:, frames], digit=videos.digit[:, frames])
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
            frames=frames,
        )

    def squared_error(
        self, parameters: Parameters, batch: Batch, *, remat: bool = False
    ) -> Float[Array, "batch frames channels height width"]:
        """Squared error of the predicted velocity."""
        networks = self.networks(parameters)
        transformer, text = networks["transformer"], networks["text_encoder"](batch.tokens)
        rotation = None if batch.frames is None else frame_rotation(transformer, batch.frames)
        velocity, _ = transformer(batch.noisy, text, batch.timestep, rotation=rotation, remat=remat)
        return jnp.square(velocity.astype(jnp.float32) - batch.velocity)

    def train_step(
        self, state: TrainState, progress: Float[Array, ""], *, coarse: bool
    ) -> tuple[TrainState, Float[Array, ""]]:
        """One step at `progress` (0..1) of the whole training; returns the state and the loss."""
        rng = jax.random.fold_in(jax.random.key(self.seed), state.step)
        time_rng, batch_rng = jax.random.split(rng)
        videos = self.batch * (NUM_FRAMES // COARSE_FRAMES if coarse else 1)
        timestep = draw_timesteps(time_rng, videos, coarse=coarse)
        batch = self.draw_batch(batch_rng, timestep, coarse=coarse)
        weight = 1.0 + (DIGIT_WEIGHT - 1.0 if coarse else 0.0) * batch.digit

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

    @partial(jax.jit, static_argnums=0, static_argnames="coarse", donate_argnums=1)
    def train(
        self, state: TrainState, progress: Float[Array, " steps"], *, coarse: bool
    ) -> tuple[TrainState, Float[Array, " steps"]]:
        """Many steps of one phase in one device call."""
        return jax.lax.scan(partial(self.train_step, coarse=coarse), state, progress)

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


def draw_timesteps(rng: PRNGKeyArray, batch: int, *, coarse: bool) -> Int[Array, " batch"]:
    """Uniform; in the coarse phase mostly from the middle, where motion and layout are decided."""
    pick_rng, time_rng = jax.random.split(rng)
    time = jax.random.uniform(time_rng, (batch,))
    if coarse:
        middle = jax.random.bernoulli(pick_rng, 0.6, (batch,))
        time = jnp.where(middle, 0.35 + 0.62 * time, time)
    return jnp.floor(1000.0 * time).astype(jnp.int32)


def draw_frames(rng: PRNGKeyArray) -> Int[Array, " frames"]:
    """Draw some frames of a video: every other one, or neighbours."""
    stride_rng, first_rng = jax.random.split(rng)
    stride = jnp.where(jax.random.bernoulli(stride_rng), NUM_FRAMES // COARSE_FRAMES, 1)
    last_first = NUM_FRAMES - 1 - (COARSE_FRAMES - 1) * stride
    first = jax.random.randint(first_rng, (), 0, last_first + 1)
    return first + stride * jnp.arange(COARSE_FRAMES)


def frame_rotation(transformer: CogVideoXTransformer, frames: Int[Array, " frames"]) -> Rotation:
    """Make the rotary embedding of some frames, each at its place in the whole video."""
    _, patch_height, patch_width = transformer.config.patch_shape
    grid = (NUM_FRAMES, HEIGHT // patch_height, WIDTH // patch_width)
    whole = transformer.rotation(grid, CAPTION_TOKENS)
    assert whole is not None

    def pick(table: Array) -> Array:
        text, video = jnp.split(table, [CAPTION_TOKENS])
        video = video.reshape(NUM_FRAMES, -1, table.shape[-1])[frames]
        return jnp.concatenate([text, video.reshape(-1, table.shape[-1])])

    return Rotation(*map(pick, whole))


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


def load_weights(folder: Path) -> Parameters:
    """Read an exported model's parameters, made float32."""
    text_config = T5Config.from_dict(TEXT_ENCODER)
    config = CogVideoXConfig.from_dict(TRANSFORMER)

    def read(file: str, rules: Any) -> dict[str, Any]:
        tensors = {
            name: tensor.astype(np.float32) for name, tensor in load_file(folder / file).items()
        }
        return convert_state(tensors, rules)

    return {
        "transformer": read(
            "transformer/diffusion_pytorch_model.safetensors", cogvideox.rules(config)
        ),
        "text_encoder": read("text_encoder/model.safetensors", t5.rules(text_config)),
    }


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

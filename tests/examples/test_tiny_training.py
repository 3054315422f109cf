"""Training the tiny model: the task it is set, its optimizer, its state on disk, its export."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from safetensors import safe_open
from transformers import AutoTokenizer, T5EncoderModel

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from export_tiny import export_tiny, make_tokenizer
from tiny_data import CAPTION_TOKENS, NUM_FRAMES, caption, load_assets, token_ids
from tiny_model import SCHEDULER, TEXT_ENCODER, TRANSFORMER, signal_and_noise
from tiny_training import (
    COARSE_UNTIL,
    LAST_RATE,
    TinyTrainer,
    draw_frames,
    draw_timesteps,
    frame_rotation,
    learning_rate,
    load_state,
    save_state,
)

BUNDLED = Path(__file__).parents[2] / "svg_jax/assets/tiny_cogvideox"

# The same architecture with few and large patches: 12 tokens a frame instead of 192.
SMALL = {**TRANSFORMER, "patch_size": 16, "num_layers": 2, "num_attention_heads": 1}
SMALL_TEXT = {**TEXT_ENCODER, "num_layers": 1}


@pytest.fixture(scope="module")
def trainer() -> TinyTrainer:
    return TinyTrainer(load_assets(), SMALL, SMALL_TEXT, batch=2, dtype=jnp.float32)


def assert_equal_trees(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_signal_and_noise_are_those_of_the_scheduler_that_is_exported():
    scheduler: Any = CogVideoXDDIMScheduler.from_config(SCHEDULER)
    signal, noise = signal_and_noise()
    np.testing.assert_allclose(signal**2, scheduler.alphas_cumprod.numpy(), atol=1e-6)
    np.testing.assert_allclose(signal**2 + noise**2, 1, atol=1e-6)
    assert signal[-1] == 0


def test_signal_and_velocity_give_the_video_back(trainer):
    timestep = jnp.array([10, 400, 999], jnp.int32)
    batch = trainer.draw_batch(jax.random.key(4), timestep)
    a, b = (table[timestep][:, None, None, None, None] for table in (trainer.signal, trainer.noise))
    video, noise = a * batch.noisy - b * batch.velocity, b * batch.noisy + a * batch.velocity
    assert float(jnp.abs(video).max()) <= 1 + 1e-5
    np.testing.assert_allclose(noise.std(), 1, atol=0.02)


def test_one_caption_in_ten_is_dropped(trainer):
    draw = jax.jit(lambda rng: trainer.draw_batch(rng, jnp.full((16,), 5, jnp.int32)).tokens)
    tokens = np.concatenate([draw(rng) for rng in jax.random.split(jax.random.key(0), 32)])
    dropped = (tokens == token_ids("")).all(axis=1)
    assert 0.06 < dropped.mean() < 0.14


@pytest.mark.parametrize(("coarse", "share"), [(False, 0.62), (True, 0.6 + 0.4 * 0.62)])
def test_timesteps_cover_the_schedule_and_lean_to_its_middle_at_first(coarse, share):
    steps = np.asarray(draw_timesteps(jax.random.key(0), 20_000, coarse=coarse))
    assert steps.min() < 5
    assert steps.max() == 999
    np.testing.assert_allclose(((steps >= 350) & (steps < 970)).mean(), share, atol=0.02)


def test_frames_are_every_other_or_neighbours_and_all_have_their_turn():
    draws = np.asarray(jax.vmap(draw_frames)(jax.random.split(jax.random.key(0), 200)))
    assert set(np.unique(np.diff(draws, axis=1))) == {1, 2}
    np.testing.assert_array_equal(np.unique(draws), np.arange(NUM_FRAMES))


def test_frames_are_rotated_as_in_the_whole_video(trainer):
    model = trainer.networks(trainer.initial_state().parameters)["transformer"]
    whole, some = (frame_rotation(model, jnp.array(f)) for f in (range(NUM_FRAMES), (3, 5)))
    tokens = (whole.cos.shape[0] - CAPTION_TOKENS) // NUM_FRAMES
    expected = [CAPTION_TOKENS + frame * tokens + np.arange(tokens) for frame in (3, 5)]
    rows = np.concatenate([np.arange(CAPTION_TOKENS), *expected])
    assert_equal_trees(some, jax.tree.map(lambda table: table[rows], whole))
    assert_equal_trees(whole, model.rotation((NUM_FRAMES, 3, 4), CAPTION_TOKENS))


def test_the_rate_warms_up_stays_and_falls():
    late = jnp.int32(10_000)
    assert float(learning_rate(jnp.float32(0), jnp.int32(0))) < 0.01
    assert float(learning_rate(jnp.float32(0.9 * COARSE_UNTIL), late)) == 1
    assert float(learning_rate(jnp.float32(1), late)) == pytest.approx(LAST_RATE)
    rates = [float(learning_rate(jnp.float32(p), late)) for p in np.linspace(COARSE_UNTIL, 1, 20)]
    assert (np.diff(rates) < 0).all()


def test_muon_has_the_matrices_of_the_blocks_and_adam_the_rest(trainer):
    state = trainer.initial_state()
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.parameters)]
    stacked = [shape for shape in shapes if len(shape) == 3 and shape[0] == SMALL["num_layers"]]
    muon, adam = (state.optimizer[1].inner_states[name].inner_state for name in ("muon", "adam"))
    assert sorted(leaf.shape for leaf in jax.tree.leaves(muon[0].mu)) == sorted(stacked)
    assert len(jax.tree.leaves(adam[0].mu)) == len(shapes) - len(stacked)


@pytest.mark.slow
def test_training_that_was_interrupted_goes_on_exactly(trainer, tmp_path):
    before, after = jnp.array([0.5, 0.55]), jnp.array([0.65, 0.7])
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        state, _ = trainer.train(trainer.initial_state(), before, coarse=True)
        save_state(tmp_path, state, {"progress": 0.55})
        whole, losses = trainer.train(state, after, coarse=False)
        loaded, record = load_state(tmp_path, trainer.initial_state())
        resumed, losses_again = trainer.train(loaded, after, coarse=False)
    assert record == {"progress": 0.55, "step": 2}
    np.testing.assert_array_equal(losses, losses_again)
    assert_equal_trees(whole, resumed)
    assert int(resumed.step) == 4


def test_a_state_that_is_saved_again_counts_on(trainer, tmp_path):
    state = trainer.initial_state()
    save_state(tmp_path, state._replace(step=jnp.int32(7)), {"progress": 0.1})
    state, record = load_state(tmp_path, state)
    save_state(tmp_path, state._replace(step=jnp.int32(9)), record)
    assert json.loads((tmp_path / "record.json").read_text())["step"] == 9


def test_the_state_of_another_model_is_refused(trainer, tmp_path):
    save_state(tmp_path, trainer.initial_state(), {})
    wider = {**SMALL, "num_attention_heads": 2}
    other = TinyTrainer(load_assets(), wider, SMALL_TEXT, batch=2, dtype=jnp.float32)
    with pytest.raises(ValueError, match="another model"):
        load_state(tmp_path, other.initial_state())


def test_what_is_exported_loads_with_the_libraries_own_classes(trainer, tmp_path):
    parameters = trainer.initial_state().parameters
    export_tiny(parameters, tmp_path, SMALL, SMALL_TEXT)
    assert_loads_whole(tmp_path)
    name = "transformer_blocks.1.ff.net.2.weight"
    with safe_open(tmp_path / "transformer/diffusion_pytorch_model.safetensors", "np") as file:
        weight = file.get_tensor(name)
    kernel = parameters["transformer"]["blocks"]["feed_forward"]["output"]["kernel"][1]
    np.testing.assert_array_equal(weight, np.asarray(kernel, np.float16).T)


def test_weights_beyond_float16_are_refused(trainer, tmp_path):
    parameters = jax.tree.map(lambda leaf: leaf + 70_000.0, trainer.initial_state().parameters)
    with pytest.raises(OverflowError, match="float16"):
        export_tiny(parameters, tmp_path, SMALL, SMALL_TEXT)


def test_the_bundled_model_is_whole_small_and_the_one_described():
    assert_loads_whole(BUNDLED)
    size = sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file())
    assert size <= 10e6
    config = json.loads((BUNDLED / "transformer/config.json").read_text())
    assert {key: value for key, value in config.items() if key[0] != "_"} == TRANSFORMER


def test_the_bundled_tokenizer_gives_the_ids_that_were_trained_on():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "tokenizer")
    for text in (
        caption(np.array([3, 0, 0, 0])),
        caption(np.array([9, 7, 7, 5])),
        "",
        "a mauve cat",
    ):
        ids = tokenizer(text, padding="max_length", max_length=16).input_ids
        np.testing.assert_array_equal(ids, token_ids(text))
    assert make_tokenizer().encode("A Red cat").ids == tokenizer("a red cat").input_ids


def assert_loads_whole(folder: Path) -> None:
    """Diffusers and transformers find every key, and no other, in an exported folder."""
    transformer: Any = CogVideoXTransformer3DModel
    text_encoder: Any = T5EncoderModel
    for model, name in ((transformer, "transformer"), (text_encoder, "text_encoder")):
        _, found = model.from_pretrained(
            folder / name, output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(found.values())
    CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "CogVideoXPipeline"

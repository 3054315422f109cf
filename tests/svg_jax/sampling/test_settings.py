"""Settings that no run can have: each is refused by its name, before anything is loaded."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from unloaded_pipelines import COGVIDEOX, HUNYUAN_VIDEO, PIPELINES, WAN, lazy, loaded

import svg_jax
from svg_jax.cli.generated import every_setting
from svg_jax.cli.tables import comparison_table
from svg_jax.evaluation.comparison import compare
from svg_jax.models import (
    CogVideoXConfig,
    CogVideoXTransformer,
    HunyuanVideoConfig,
    WanConfig,
)
from svg_jax.models.cogvideox_vae import CogVideoXVAE
from svg_jax.models.cogvideox_vae_config import CogVideoXVAEConfig
from svg_jax.models.wan_vae_config import WanVAEConfig
from svg_jax.sampling import CogVideoXPipeline, HunyuanVideoPipeline, WanPipeline, memory
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.hunyuan_video.prompts import HunyuanVideoEncoders
from svg_jax.sampling.latents import RELEASED, Compression, decoded_frames
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.settings import SettingError, check_settings, settings_of
from svg_jax.sampling.settings.rules import ArrayOf

NAN, INF = math.nan, math.inf
SETTINGS = every_setting()
SPARSITY = svg_jax.SparsityConfig(density=0.8, sampled_rows=4, band_multiple=1)
WARMUP = svg_jax.Warmup(steps=0.3)
SIZE = {"height": 32, "width": 48, "num_frames": 9}

# What no number, flag, text or object of its kind is; by setting, what is out of its range, too.
NO_NUMBER = [NAN, INF, -INF, "6", "", True, [6.0], 6j, np.array([1.0, 2.0]), {}]
NO_WHOLE = [*NO_NUMBER, 1.5, 50.0, np.float32(4)]
NO_FLAG = [0, 1, "yes", [], NAN]
NO_TEXT = [3, b"a cat", [], ["a", 3], {"a": 1}, "half a pair \ud800", ["a", "\udfff"]]
NO_PATH = [3, b"state", NAN, ["state"]]
BAD: dict[str, list[Any]] = {
    "prompt": NO_TEXT,
    "negative_prompt": NO_TEXT,
    "height": [*NO_WHOLE, 0, -16],
    "width": [*NO_WHOLE, 0],
    "num_frames": [*NO_WHOLE, 0, -1],
    "num_inference_steps": [*NO_WHOLE, 0],
    "num_videos_per_prompt": [*NO_WHOLE, 0, None],
    "max_sequence_length": [*NO_WHOLE, 0, 10**6],
    "guidance_scale": [*NO_NUMBER, -1, 1e4, 1e39, 10**400],
    "true_cfg_scale": [*NO_NUMBER, -1, 1e300, None],
    "guidance_interval": [(0, NAN), (0.5, 0.2), (-0.1, 1), (0, 1.1), 0.3, "01", (0,), (0, "1")],
    "use_dynamic_cfg": [*NO_FLAG, None],
    "scheduler": ["", "DDIM", "lcm", 3, ["ddim"]],
    "flow_shift": [*NO_NUMBER, 0, -3.0, 1e-30, 1e30],
    "seed": [*NO_WHOLE, -1, 2**64, 10**400],
    "sparsity": ["svg", 0.25, {"density": 0.25}],
    "warmup": ["dense", 0.2, {"steps": 0.2}],
    "attend": ["dense", 3],
    "attend_id": [3, "", b"a"],
    "output_type": ["pil", "", None, 3, ["np"]],
    "vae_tiling": [*NO_FLAG, None],
    "callback_on_step_end": ["print", 3],
    "state_file": NO_PATH,
    "save_every": [*NO_WHOLE, -1, None],
    "resume": [*NO_FLAG, None],
    "allow_rounding": [*NO_FLAG, None],
    "fps": [*NO_NUMBER, 0, -8, 1e-9, 1e9],
    "enlarge": [*NO_WHOLE, 0, 10**9],
}


def bad_arrays(rule: ArrayOf) -> list[Any]:
    shape = (1, 2, 3, 4, 5, 6)[: len(rule.axes)]
    good = np.ones(shape, rule.kinds[0])
    bad = [3, "x.npy", [[1.0]], good[..., None, None], good[:0], good.astype(complex)]
    bad += [good.astype(str), good.astype(object)]
    if "float" in rule.kinds:
        bad += [good * NAN, good * np.float64(1e300), (good * INF).astype(ml_dtypes.bfloat16)]
        bad += [jnp.full(shape, INF, jnp.float32)]
    return bad


BAD |= {
    field: bad_arrays(of.rule) for field, of in SETTINGS.items() if isinstance(of.rule, ArrayOf)
}


def test_every_setting_has_values_that_it_cannot_have():
    assert BAD.keys() == SETTINGS.keys() - {"image", "last_image"}  # see the tests of images


@pytest.mark.parametrize("field", BAD)
def test_a_value_without_meaning_is_refused_by_the_name_of_its_setting(field):
    for value in BAD[field]:
        with pytest.raises(SettingError) as error:
            check_settings({field: value}, SETTINGS)
        assert error.value.field == field, value
        sentence = str(error.value)
        assert sentence.startswith(f"{field} ")
        assert len(sentence) < 300, sentence
        assert sentence.isprintable()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_refuses_it_before_anything_is_loaded(name):
    pipeline = PIPELINES[name]
    taken = settings_of(pipeline.settings_class).keys()
    for field in sorted(taken & BAD.keys()):
        for value in (BAD[field][0], BAD[field][-1]):
            with pytest.raises(SettingError) as error:
                pipeline(**{"prompt": "a", **SIZE, field: value})
            assert error.value.field == field, value


def test_values_of_every_library_are_taken_and_become_plain():
    given = {
        "height": np.int64(32),
        "guidance_scale": np.float32(4),
        "use_dynamic_cfg": np.bool_(True),
        "guidance_interval": np.array([0, 0.5]),
        "seed": np.uint64(2**64 - 1),
        "prompt": ("a", "b"),
        "sparsity": SPARSITY,
        "warmup": WARMUP,
        "latents": jnp.ones((1, 2, 3, 4, 5), jnp.bfloat16),
    }
    checked = check_settings(given, SETTINGS)
    assert [type(checked[name]) for name in list(given)[:5]] == [int, float, bool, tuple, int]
    assert checked["seed"] == 2**64 - 1
    assert checked["guidance_interval"] == (0.0, 0.5)


class Tensor:
    """Of another library: what numpy can read is taken, what it cannot is named."""

    def __init__(self, error=None):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        if self.error is not None:
            raise self.error
        return np.ones((1, 1, 1, 1, 1), np.float32)


def test_tensors_of_other_libraries_are_taken_if_numpy_can_read_them():
    assert isinstance(check_settings({"latents": Tensor()}, SETTINGS)["latents"], np.ndarray)
    ones = torch.ones(1, 2, 3, 4, 5)
    for tensor in (ones.bfloat16(), ones.clone().requires_grad_()):
        found = check_settings({"latents": tensor}, SETTINGS)["latents"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.ones((1, 2, 3, 4, 5)))
    for error in (TypeError("on a GPU"), RuntimeError("needs a gradient")):
        with pytest.raises(SettingError, match="latents must be an array: got Tensor"):
            check_settings({"latents": Tensor(error)}, SETTINGS)


TEXT = {"prompt_embeds": np.ones((1, 8, 16), np.float32)}


@pytest.mark.parametrize(
    ("arguments", "field", "message"),
    [
        ({"prompt": "a", **TEXT}, "prompt", "either a prompt or prompt_embeds"),
        ({}, "prompt", "either a prompt or prompt_embeds"),
        ({"prompt": ["a"], "negative_prompt": ["b", "c"]}, "negative_prompt", "got 2 for 1"),
        ({**TEXT, "latents": np.ones((2, 3, 4, 4, 6))}, "latents", r"\(1, 3, 4, 4, 6\)"),
        ({"prompt_embeds": np.ones((1, 8, 9), np.float32)}, "prompt_embeds", r"\(1, 8, 16\)"),
        ({**TEXT, "scheduler": "euler"}, "scheduler", "is 'ddim' or 'dpm'"),
        ({**TEXT, "num_inference_steps": 10**6}, "num_inference_steps", "1 to 1000"),
        ({**TEXT, "labels": np.ones((2, 1, 2), bool)}, "labels", "pass a sparsity"),
        (
            {**TEXT, "sparsity": SPARSITY, "labels": np.ones((2, 1, 3), bool)},
            "labels",
            "2 layers and 2 heads",
        ),
        ({**TEXT, "resume": True}, "resume", "state_file"),
        ({**TEXT, "sparsity": SPARSITY, "attend": loaded}, "attend", "pass no sparsity"),
        ({**TEXT, "warmup": WARMUP}, "warmup", "pass a sparsity, too"),
        ({**TEXT, "warmup": WARMUP, "attend": loaded}, "warmup", "pass a sparsity, too"),
        ({**TEXT, "sparsity": SPARSITY, "warmup": 0.3}, "warmup", "must be a Warmup: got 0.3"),
        ({**TEXT, "attend": loaded, "state_file": "state"}, "state_file", "attend"),
    ],
)
def test_settings_that_do_not_fit_each_other(arguments, field, message):
    with pytest.raises(SettingError, match=message) as error:
        PIPELINES["CogVideoX"](**SIZE | arguments)
    assert error.value.field == field


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_no_setting_is_named_as_it_was_written(name):
    for way in (PIPELINES[name], PIPELINES[name].settings):
        with pytest.raises(TypeError, match=r"^this model takes no heigth: did you mean height\?$"):
            way("a", heigth=32)
    other = PIPELINES["Wan" if name == "CogVideoX" else "CogVideoX"].settings("a")
    with pytest.raises(SettingError, match=r"^settings must be what pipe.settings\(\) makes"):
        PIPELINES[name].completed(other)


def test_a_value_that_was_made_by_hand_is_completed_when_it_is_used():
    given: dict[str, Any] = {**TEXT, **SIZE}
    settings = CogVideoXSettings(guidance_scale=1, **given)
    assert settings.num_inference_steps is None
    assert PIPELINES["CogVideoX"].prepare(settings).schedule.num_steps == 50
    assert "num_frames" in repr(settings)
    assert "  guidance_scale: Strength of guidance" in (CogVideoXSettings.__doc__ or "")


def test_steps_that_lie_too_close_for_float32_are_refused():
    with pytest.raises(SettingError, match="num_inference_steps of 1000 makes no finite steps"):
        PIPELINES["Wan"]("a", **SIZE, flow_shift=1000, num_inference_steps=1000)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    "size",
    [
        {"num_frames": 4 * 10**8 + 1},
        {"num_frames": 2**63 - 3},
        {"height": 2**40},
        {"width": 2**62},
        {"num_videos_per_prompt": 10**9},
        {"num_videos_per_prompt": 2**63 - 1},
    ],
    ids=str,
)
def test_sizes_that_no_memory_holds_are_refused_at_once(name, size):
    with pytest.raises(ValueError, match=r"GB|positions") as error:
        PIPELINES[name]("a", **SIZE | size)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    "field", ["num_frames", "height", "width", "num_videos_per_prompt", "num_inference_steps"]
)
def test_numbers_that_no_float_holds_are_refused_by_name(name, field):
    with pytest.raises(SettingError, match=f"{field} must be .*: got 1000") as error:
        PIPELINES[name]("a", **SIZE | {field: 10**4000})
    assert error.value.field == field
    assert len(str(error.value)) < 200


def test_what_fits_is_not_refused(monkeypatch):
    """Latents of 1152 bytes, and four times the hidden states of 26 tokens: nothing else counts."""
    run = {**TEXT, **SIZE, "guidance_scale": 1}
    for limit, fits in ((1152 + 4 * 26 * 32 * 4, True), (14_000, False)):
        monkeypatch.setattr(memory, "_host_bytes", lambda limit=limit: limit)
        if fits:
            PIPELINES["CogVideoX"].prepare(PIPELINES["CogVideoX"].settings(**run))
        else:
            with pytest.raises(SettingError, match="too large"):
                PIPELINES["CogVideoX"].prepare(PIPELINES["CogVideoX"].settings(**run))


def test_the_vae_says_how_large_latents_are():
    vae = CogVideoXVAEConfig(
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
    )
    cogvideox = CogVideoXPipeline(
        transformer=lazy(CogVideoXConfig(**COGVIDEOX)), scheduler=SchedulerConfig(), vae=lazy(vae)
    )
    size = {"height": 40, "width": 24, "num_frames": 9}
    run = cogvideox.prepare(cogvideox.settings(**TEXT, guidance_scale=1, **size))
    assert run.state.latents.shape == (1, 5, 4, 10, 6)
    with pytest.raises(SettingError, match="height must be a positive multiple of 8: got 36"):
        cogvideox.prepare(cogvideox.settings(**TEXT, guidance_scale=1, **size | {"height": 36}))
    wan = WanPipeline(
        transformer=lazy(WanConfig(**WAN)),
        scheduler=SchedulerConfig("unipc", shift=3.0),
        vae=lazy(
            WanVAEConfig(
                z_dim=4,
                dim_mult=(1, 1, 1),
                temperal_downsample=(False, True),
                latents_mean=(0.0,) * 4,
                latents_std=(1.0,) * 4,
                scale_factor_temporal=2,
                scale_factor_spatial=4,
            )
        ),
    )
    run = wan.prepare(wan.settings(**TEXT, guidance_scale=1, **size))
    assert run.state.latents.shape == (1, 4, 5, 10, 6)
    with pytest.raises(SettingError, match=r"num_frames must be of the form 2k \+ 1: got 8"):
        wan.prepare(wan.settings(**TEXT, guidance_scale=1, **size | {"num_frames": 8}))


def test_any_number_of_frames_is_made_as_diffusers_makes_it():
    """Its VAE decodes pairs of latent frames, and alone the first of an odd number."""
    config = CogVideoXVAEConfig(
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
    )
    vae = CogVideoXVAE(config, rngs=nnx.Rngs(0))
    for latent_frames in (3, 4):
        latents = jax.ShapeDtypeStruct((1, 4, latent_frames, 2, 2), jnp.float32)
        video = jax.eval_shape(vae.decode, latents)
        assert video.shape[2] == decoded_frames(latent_frames, Compression(2, 2))
    made = [decoded_frames((frames - 1) // 4 + 1, RELEASED) for frames in (13, 48, 8, 49, 9)]
    assert made == [16, 48, 8, 49, 9]


def test_a_number_of_frames_that_is_rounded_is_said(caplog):
    for frames in (48, 13):
        size = SIZE | {"num_frames": frames}
        pipeline = PIPELINES["CogVideoX"]
        pipeline.prepare(pipeline.settings(**TEXT, guidance_scale=1, **size))
    assert [record.getMessage() for record in caplog.records] == [
        "of num_frames=13 this model makes 16 frames"
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 6000),
        ({"image_condition_type": "token_replace"}, 1000),
        ({"image_condition_type": "latent_concat", "in_channels": 9}, 1000),
    ],
)
def test_guidance_of_hunyuan_video_is_diffusers(changes, expected):
    config = HunyuanVideoConfig(**HUNYUAN_VIDEO | changes)
    features = {
        **TEXT,
        "pooled_prompt_embeds": np.ones((1, 8), np.float32),
        "prompt_attention_mask": np.ones((1, 8), int),
    }
    if changes:
        features["image_latents"] = np.ones((1, 4, 1, 4, 6), np.float32)
    pipeline = HunyuanVideoPipeline(
        transformer=lazy(config),
        scheduler=SchedulerConfig("euler", shift=7.0),
        encoders=HunyuanVideoEncoders(),
    )
    run: Any = pipeline.prepare(pipeline.settings(**features, **SIZE))
    assert run.conditions.number == expected


@pytest.fixture(scope="module")
def pipeline():
    transformer = CogVideoXTransformer(CogVideoXConfig(**COGVIDEOX), rngs=nnx.Rngs(0))
    return CogVideoXPipeline(transformer=transformer, scheduler=SchedulerConfig())


RUN = {**TEXT, **SIZE, "guidance_scale": 1, "num_inference_steps": 2}


def test_an_attention_of_ones_own_runs_in_a_pipeline(pipeline):
    traces, states = [], []

    def attend(query, key, value, *, layout, text_length, layer, step_state):
        traces.append(layout)
        states.append(type(step_state))
        out, _ = svg_jax.attend_dense(
            query,
            key,
            value,
            layout=layout,
            text_length=text_length,
            layer=layer,
            step_state=step_state,
        )
        return out, jnp.abs(out).max()

    video = pipeline(**RUN, attend=attend)
    np.testing.assert_array_equal(video.latents, pipeline(**RUN).latents)
    compiled = len(traces)
    pipeline(**RUN | {"num_inference_steps": 3, "seed": 4}, attend=attend)
    assert len(traces) == compiled
    assert {state.__name__ for state in states} == {"StepState"}
    comparison = compare(pipeline, pipeline.settings(**RUN, attend=attend))
    report = comparison.report
    assert len(traces) == compiled
    assert (report.pattern, report.dense_steps, report.density) == ("attend", 0, None)
    np.testing.assert_array_equal(comparison.dense.latents, comparison.sparse.latents)
    comparison_table(report)
    assert report.values()["density"] is None
    with pytest.raises(SettingError, match="either a sparsity or an attend"):
        compare(pipeline, pipeline.settings(**RUN))


def test_seeds_have_64_bits_and_the_smaller_ones_their_noise(pipeline):
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        run = pipeline.prepare(pipeline.settings(**RUN, seed=seed))
        philox = np.random.Generator(np.random.Philox(seed))
        noise = philox.standard_normal((1, 3, 4, 4, 6), dtype=np.float32)
        np.testing.assert_array_equal(run.state.latents, noise)
    for sparsity in (None, SPARSITY):
        dpm = RUN | {"scheduler": "dpm", "seed": 2**64 - 1}
        assert np.isfinite(pipeline(**dpm, sparsity=sparsity).latents).all()


def test_a_seed_that_was_drawn_is_told_recorded_and_gone_on_with(pipeline, tmp_path, caplog):
    class Stop(Exception):
        pass

    def stop(_):
        raise Stop

    drawn = RUN | {"seed": None, "state_file": tmp_path / "state"}
    with pytest.raises(Stop):
        pipeline(**drawn, callback_on_step_end=stop)
    assert "was drawn" in caplog.text
    video = pipeline(**drawn, resume=True)
    seed = video.info.seed
    assert f"the seed {seed} was drawn" in caplog.text
    np.testing.assert_array_equal(video.latents, pipeline(**RUN, seed=seed).latents)
    assert pipeline(**RUN, seed=None).info.seed != seed


def test_no_negative_prompt_is_the_empty_one():
    for name in ("CogVideoX", "Wan"):
        settings = PIPELINES[name].settings("a", negative_prompt=None)
        assert vars(settings) == vars(PIPELINES[name].settings("a"))
        assert settings.negative_prompt == ""


def test_a_short_run_says_how_many_of_its_steps_are_dense(pipeline, caplog):
    pipeline(**RUN | {"num_inference_steps": 4}, sparsity=SPARSITY, warmup=WARMUP)
    assert [record.getMessage() for record in caplog.records] == [
        "few steps: 1 of 4 dense, the first ones"
    ]


def test_a_pipeline_and_its_outcome_are_shown_in_a_line(pipeline):
    assert repr(PIPELINES["HunyuanVideo"]) == (
        "HunyuanVideoPipeline(2 layers of width 32 in float32; with text_encoder, text_encoder_2)"
    )
    shown = repr(pipeline(**RUN))
    assert "latents=float32[1, 3, 4, 4, 6]" in shown
    assert len(shown) < 200

"""What of the Wan pipeline is its own: shift and sampler, its images, its defaults."""

import json
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from flax import nnx
from parity import relative_error
from tiny_pipelines import check_video, picture, run_diffusers
from wan_pipelines import CALL, NOISE, SCHEDULER, TRANSFORMER, embeds, noise

from svg_jax.config import PAPER_PRESETS
from svg_jax.convert import convert_pipeline
from svg_jax.models import WanConfig
from svg_jax.sampling import WanPipeline, from_pretrained
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.wan.image_conditions import known_frames


@pytest.fixture
def make(pipelines):
    """Both pipelines of a variant, and the converted folder."""
    return pipelines["Wan"]


def test_the_shift_can_be_chosen(make):
    theirs, ours, _ = make("T2V")
    given = {"prompt_embeds": embeds(tokens=5), "guidance_scale": 1.0}
    own = theirs.scheduler
    shifted: dict[str, Any] = SCHEDULER | {"flow_shift": 5.0}
    theirs.scheduler = diffusers.UniPCMultistepScheduler(**shifted)
    expected = run_diffusers(theirs, noise(), **CALL, **given)
    theirs.scheduler = own
    check_video(ours(latents=noise(), flow_shift=5, **CALL, **given), *expected)


class EvenSteps(diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler with the sigmas that HunyuanVideo's pipeline passes; Wan's would leave them to it."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **_options):
        sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        super().set_timesteps(device=device, sigmas=sigmas)


def test_eulers_steps_are_those_of_diffusers(make):
    theirs, ours, _ = make("T2V")
    text = {"prompt_embeds": embeds(tokens=5), "negative_prompt_embeds": embeds(tokens=5, seed=3)}
    own = theirs.scheduler
    theirs.scheduler = EvenSteps(shift=3.0)
    expected = run_diffusers(theirs, noise(), **CALL, **text)
    theirs.scheduler = own
    video = ours(latents=noise(), scheduler="euler", **CALL, **text)
    assert video.info.steps[0].timestep == 1000
    assert video.info.steps[1].timestep == 900  # of shift 3; not a whole number in general
    check_video(video, *expected)


def test_images_may_come_encoded(make):
    _, ours, _ = make("FLF2V")
    pictures = {"image": picture(7), "last_image": picture(8)}
    text = {"prompt_embeds": embeds(), "guidance_scale": 1.0}
    expected = ours.prepare(ours.settings(**text, **CALL, **pictures)).conditions
    assert expected.channels.shape == (1, 8, *NOISE[1:])
    arrays = {"image_embeds": expected.image_features, "image_latents": expected.channels[:, 4:]}
    for given in (
        arrays,
        {"image_embeds": expected.image_features, **pictures},
        {"image_latents": expected.channels[:, 4:], **pictures},
    ):
        found = ours.prepare(ours.settings(**text, **CALL, **given)).conditions
        np.testing.assert_array_equal(found.channels, expected.channels)
        np.testing.assert_array_equal(found.image_features, expected.image_features)
    text["prompt_embeds"] = embeds(2)
    several = ours.prepare(ours.settings(**text, **CALL, **arrays, num_videos_per_prompt=2))
    assert several.state.latents.shape == (4, *NOISE)
    assert several.conditions.channels.shape == (4, 8, *NOISE[1:])
    assert several.conditions.image_features.shape == (4, 10, 8)
    prompts = several.conditions.text
    np.testing.assert_array_equal(prompts, embeds(2).repeat(2, axis=0))


def test_an_image_for_each_prompt_in_any_form(make, tmp_path):
    _, ours, _ = make("FLF2V")
    picture(9).save(tmp_path / "first.png")
    text = {"guidance_scale": 1.0, **CALL}

    def images_of(prompts, image, last_image):
        given = {"image": image, "last_image": last_image, "prompt_embeds": embeds(prompts)}
        return ours.prepare(ours.settings(**text, **given)).conditions

    alone = [images_of(1, picture(seed), picture(8)) for seed in (7, 9)]
    pixels = torch.from_numpy(np.asarray(picture(7)).copy()).permute(2, 0, 1)
    both = images_of(2, [pixels, tmp_path / "first.png"], np.asarray(picture(8))[None])
    for name in ("channels", "image_features"):
        expected = np.concatenate([np.asarray(getattr(each, name)) for each in alone])
        np.testing.assert_allclose(getattr(both, name), expected, atol=1e-6)
    with pytest.raises(ValueError, match="last_image must be one or as many as the prompts: got 3"):
        images_of(2, picture(7), [picture(8)] * 3)


def test_a_saved_run_knows_its_images_by_their_pixels(make, tmp_path):
    _, ours, _ = make("I2V")
    picture(7).save(tmp_path / "a.png")
    forms = [picture(7), tmp_path / "a.png", str(tmp_path / "a.png"), [picture(7)]]
    told = [
        ours.fingerprint(ours.settings(None, prompt_embeds=embeds(), image=form)) for form in forms
    ]
    assert all(each == told[0] for each in told)
    assert told[0] != ours.fingerprint(
        ours.settings(None, prompt_embeds=embeds(), image=picture(8))
    )


def test_known_frames_of_both_images():
    np.testing.assert_array_equal(
        known_frames(3, True)[..., 0, 0], [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    )


def test_components_are_loaded_where_they_are_used(make):
    _, ours, _ = make("I2V")
    for name in ("transformer", "vae", "text_encoder", "image_encoder"):
        assert isinstance(getattr(ours, name), Lazy)
    assert ours.vae.dtype == ours.image_encoder.dtype == np.float32


def test_latents_stay_float32_beside_bfloat16(make):
    _, ours, folder = make("I2V")
    rough: Any = from_pretrained(folder, dtype="bfloat16")
    given = {"prompt": "a cat", "image": picture(7), "guidance_scale": 1.0, "latents": noise()}
    call = CALL | {"num_inference_steps": 1, "output_type": "latent"}
    found, exact = (pipe(**given, **call).latents for pipe in (rough, ours))
    assert found.dtype == np.float32
    assert 1e-4 < relative_error(found, exact) < 0.1


def test_a_checkpoint_without_encoders_and_vae(make, tmp_path):
    _, whole, folder = make("I2V")
    source = folder.parent / "source"
    convert_pipeline(source, tmp_path / "out", components=["transformer"])
    ours: Any = from_pretrained(tmp_path / "out", dtype="float32")
    text = {"prompt_embeds": embeds(), "guidance_scale": 1.0}
    images = whole.prepare(whole.settings(**text, **CALL, image=picture(7))).conditions
    encoded = {"image_embeds": images.image_features, "image_latents": images.channels[:, 4:]}
    video = ours(**text, **CALL, **encoded)
    assert video.frames is None
    np.testing.assert_array_equal(
        video.latents, whole(**text, **CALL, image=picture(7), output_type="latent").latents
    )
    for arguments, message in [
        ({"prompt": "a cat", **encoded}, "no text encoder: pass prompt_embeds"),
        ({"prompt": "a", "image": picture(7)}, "without its VAE: pass image_latents"),
        (
            {"prompt": "a", "image": picture(7), "image_latents": encoded["image_latents"]},
            "without its image encoder: pass image_embeds",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            ours(**arguments, **CALL)


def pipeline_of(shift=3.0, **changes):
    config = WanConfig(**TRANSFORMER | changes)
    transformer: Any = Lazy(config, np.dtype(np.float32), nnx.Module)
    return WanPipeline(transformer=transformer, scheduler=SchedulerConfig("unipc", shift=shift))


@pytest.mark.parametrize(
    ("shift", "heads", "image", "expected", "preset"),
    [
        (3.0, 2, False, (60, 104), "wan-t2v-720p"),
        (3.0, 40, False, (90, 160), "wan-t2v-720p"),
        (3.0, 40, True, (60, 104), "wan-i2v-480p"),
        (5.0, 40, True, (90, 160), "wan-i2v-720p"),
    ],
)
def test_settings_default_to_the_authors(shift, heads, image, expected, preset):
    changes: dict[str, Any] = {"rope_max_seq_len": 1024, "num_attention_heads": heads}
    changes["attention_head_dim"] = 128
    given = {}
    if image:
        changes |= {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": heads * 128}
        given["image_embeds"] = np.zeros((1, 5, 8), np.float32)
        given["image_latents"] = np.zeros((1, 4, 21, *expected), np.float32)
    ours = pipeline_of(shift, **changes)
    run = ours.prepare(
        ours.settings(prompt_embeds=embeds(), negative_prompt_embeds=embeds(), **given)
    )
    assert run.state.latents.shape == (1, 4, 21, *expected)
    assert run.schedule.num_steps == (40 if image else 50)
    assert set(run.scales) == {5.0}
    assert ours.paper_sparsity() is PAPER_PRESETS[preset]
    if image:
        assert ours.paper_preset(720, 1280) == "wan-i2v-720p"
        assert ours.paper_preset(480, 832) == "wan-i2v-480p"
        assert ours.paper_preset(832, 480) == "wan-i2v-480p"


TEXT = {"prompt_embeds": embeds(), "guidance_scale": 1}
LATENTS = np.zeros((1, 4, 3, 4, 6), np.float32)


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        ("T2V", {"prompt": "a", "negative_prompt_embeds": embeds(2)}, "as many and as long"),
        ("T2V", TEXT | {"width": 1024}, "exceed the 32 that this model has positions for"),
        ("I2V", TEXT, "image is missing"),
        ("I2V", TEXT | {"image_embeds": embeds()}, "image is missing"),
        ("I2V", TEXT | {"image": picture(7), "last_image": picture(7)}, "takes one image"),
        ("FLF2V", TEXT | {"image": picture(7)}, "last_image is missing: .* between two frames"),
        (
            "FLF2V",
            TEXT | {"image": picture(7), "last_image": picture(7), "num_frames": 1},
            "num_frames must be at least 5",
        ),
        (
            "I2V",
            TEXT | {"image": picture(7), "image_latents": LATENTS, "image_embeds": embeds()},
            "either images or both of",
        ),
        (
            "I2V",
            TEXT | {"image": picture(7), "image_latents": LATENTS[..., :5]},
            r"image_latents must have the shape \('batch', 4, 3, 4, 6\): got \(1, 4, 3, 4, 5\)",
        ),
        (
            "FLF2V",
            TEXT | {"image_latents": LATENTS, "image_embeds": np.zeros((1, 5, 8), np.float32)},
            r"image_embeds must have the shape \('batch', 10, 8\): got \(1, 5, 8\)",
        ),
        (
            "I2V",
            TEXT | {"image_latents": LATENTS, "image_embeds": np.zeros((3, 5, 8), np.float32)},
            "image_embeds must be one for all prompts or one for each of 1: got 3",
        ),
        (
            "I2V",
            TEXT | {"image": picture(7), "image_latents": LATENTS * np.nan},
            "image_latents has values that are not finite",
        ),
        (
            "I2V",
            {"prompt": "a", "image": picture(7), "max_sequence_length": 256},
            "max_sequence_length must be 512 tokens for image to video, as it was trained: got 256",
        ),
        (
            "I2V",
            {"prompt_embeds": embeds(tokens=7), "image": picture(7)},
            "prompt_embeds must be 512 tokens",
        ),
    ],
)
def test_arguments_that_do_not_fit(make, variant, arguments, message):
    _, ours, _ = make(variant)
    with pytest.raises(ValueError, match=message):
        ours(**CALL | arguments)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"boundary_ratio": 0.9}, "a Wan 2.2 of two transformers"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "of two transformers"),
        ({"expand_timesteps": True}, "a Wan 2.2 with times by token"),
    ],
)
def test_wan_2_2_is_refused(make, more, message, tmp_path):
    _, _, folder = make("T2V")
    source = tmp_path / "source"
    for part in ("transformer", "scheduler", "tokenizer"):
        shutil.copytree(folder.parent / "source" / part, source / part)
    index = json.loads((folder / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | more))
    convert_pipeline(source, tmp_path / "out", components=["transformer"])
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "out")

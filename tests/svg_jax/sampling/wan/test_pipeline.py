"""The Wan pipeline against diffusers' own, from prompts and images to frames, tiny checkpoints."""

import json
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from parity import TOLERANCE, randomised, relative_error
from real_tokenizers import real_tokenizer
from tiny_pipelines import both_of_each, picture

from svg_jax import cli
from svg_jax.config import PAPER_PRESETS, SparsityConfig, Warmup
from svg_jax.convert import convert_pipeline
from svg_jax.models import WanConfig
from svg_jax.sampling import WanPipeline, from_pretrained
from svg_jax.sampling.components import Lazy
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.wan.image_conditions import known_frames

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WITH_IMAGE = TRANSFORMER | {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24}
TRANSFORMERS = {
    "T2V": TRANSFORMER,
    "I2V": WITH_IMAGE,
    "FLF2V": WITH_IMAGE | {"pos_embed_seq_len": 10},
}
VAE: dict[str, Any] = {
    "base_dim": 8,  # of 3 channels a norm makes much of a rounding error
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, -0.4],
    "latents_std": [0.9, 1.1, 0.7, 1.3],
}
T5: dict[str, Any] = {
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 32128,
}
CLIP: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
    "hidden_act": "gelu",
}
SCHEDULER: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
COMPONENTS = {
    "scheduler": "UniPCMultistepScheduler",
    "tokenizer": "T5TokenizerFast",
    "text_encoder": "UMT5EncoderModel",
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "image_encoder": "CLIPVisionModel",
    "image_processor": "CLIPImageProcessor",
}
IMAGES = ("image_encoder", "image_processor")
SIZE = {"height": 32, "width": 48, "num_frames": 9}
CALL = SIZE | {"num_inference_steps": 4}
NOISE = (4, 3, 4, 6)
PROMPTS = ["A cat  &amp; a dog", "Surfing at dawn: waves, and an unusually long description of it"]


def write_checkpoint(folder, variant):
    """A pipeline folder with all parameters random; returns diffusers' pipeline of it."""
    encoder_config = transformers.UMT5Config(**T5, feed_forward_proj="gated-gelu")
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    modules: dict[str, Any] = {
        "transformer": randomised(diffusers.WanTransformer3DModel(**TRANSFORMERS[variant]), 0),
        "vae": randomised(diffusers.AutoencoderKLWan(**VAE), 1),
        "text_encoder": randomised(transformers.UMT5EncoderModel(encoder_config), 2),
        "scheduler": diffusers.UniPCMultistepScheduler(**SCHEDULER),
        "tokenizer": tokenizer(
            tokenizer_file=str(real_tokenizer("t5-json") / "tokenizer.json"),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
    }
    if variant != "T2V":
        vision: Any = transformers.CLIPVisionModel
        processor: Any = transformers.CLIPImageProcessorPil
        modules["image_encoder"] = randomised(vision(transformers.CLIPVisionConfig(**CLIP)), 3)
        modules["image_processor"] = processor(size={"shortest_edge": 28}, crop_size=28)
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    write_index(folder, "WanPipeline" if variant == "T2V" else "WanImageToVideoPipeline", modules)
    kind = diffusers.WanPipeline if variant == "T2V" else diffusers.WanImageToVideoPipeline
    pipe: Any = kind(**modules)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_index(folder, pipeline, modules, **more):
    classes = {name: ["library", COMPONENTS[name]] for name in modules}
    index = {"_class_name": pipeline, "boundary_ratio": None, **classes, **more}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Both pipelines of a variant, and the converted folder."""
    return both_of_each(tmp_path_factory, write_checkpoint)


def noise(batch=1):
    return np.random.default_rng(1).normal(size=(batch, *NOISE)).astype(np.float32)


def embeds(batch=1, tokens=512, seed=2):
    return np.random.default_rng(seed).normal(size=(batch, tokens, 16)).astype(np.float32)


def run_diffusers(pipe, latents, **arguments):
    """Latents and frames of diffusers' pipeline."""
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    found = {}

    def keep(_pipe, _step, _timestep, values):
        found["latents"] = values["latents"].numpy()
        return values

    frames = pipe(
        **CALL, **tensors, latents=torch.from_numpy(latents), callback_on_step_end=keep
    ).frames
    return found["latents"], frames


def check(video, latents, frames):
    assert relative_error(video.latents, latents) <= TOLERANCE
    assert frames.std() > 0.05  # neither grey nor all clipped
    assert video.frames.shape == frames.shape
    np.testing.assert_allclose(video.frames, frames, atol=3e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": PROMPTS, "negative_prompt": ["ugly", "worst quality"]},
        {"prompt_embeds": embeds(2, 7), "negative_prompt_embeds": embeds(2, 7, seed=3)},
        {"prompt": PROMPTS, "guidance_scale": 1.0, "max_sequence_length": 6},
    ],
    ids=["guided", "embeds", "unguided"],
)
def test_text_to_video_is_that_of_diffusers(make, arguments):
    theirs, ours, _ = make("T2V")
    expected = run_diffusers(theirs, noise(2), **arguments)
    check(ours(latents=noise(2), **CALL, **arguments), *expected)


@pytest.mark.parametrize(
    ("variant", "arguments"),
    [
        ("I2V", {"prompt": PROMPTS[0], "negative_prompt": "ugly"}),
        ("I2V", {"prompt_embeds": embeds(2), "guidance_scale": 1.0}),
        ("FLF2V", {"prompt": PROMPTS, "last_image": picture(8, 66, 40)}),
    ],
)
def test_image_to_video_is_that_of_diffusers(make, variant, arguments):
    theirs, ours, _ = make(variant)
    batch = len(arguments.get("prompt_embeds", [arguments.get("prompt")]))
    batch = 2 if variant == "FLF2V" else batch
    expected = run_diffusers(theirs, noise(batch), image=picture(7), **arguments)
    check(ours(latents=noise(batch), image=picture(7), **CALL, **arguments), *expected)


def test_the_shift_can_be_chosen(make):
    theirs, ours, _ = make("T2V")
    given = {"prompt_embeds": embeds(tokens=5), "guidance_scale": 1.0}
    own = theirs.scheduler
    shifted: dict[str, Any] = SCHEDULER | {"flow_shift": 5.0}
    theirs.scheduler = diffusers.UniPCMultistepScheduler(**shifted)
    expected = run_diffusers(theirs, noise(), **given)
    theirs.scheduler = own
    check(ours(latents=noise(), flow_shift=5, **CALL, **given), *expected)


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
    expected = run_diffusers(theirs, noise(), **text)
    theirs.scheduler = own
    video = ours(latents=noise(), scheduler="euler", **CALL, **text)
    assert video.info.steps[0].timestep == 1000
    assert video.info.steps[1].timestep == 900  # of shift 3; not a whole number in general
    check(video, *expected)


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


def test_sparse_steps_follow_the_warm_up(make):
    _, ours, _ = make("I2V")
    video = ours(
        prompt="a cat",
        image=np.asarray(picture(7)),
        sparsity=SparsityConfig(density=0.6, sampled_rows=4),
        warmup=Warmup(steps=0.4),
        guidance_interval=(0, 0.75),
        **CALL,
    )
    profiles = video.info.profiles
    assert [profile.labels.shape for profile in profiles] == [(2, 2, 2), (2, 2, 2), (2, 1, 2)]
    assert np.isfinite(video.frames).all()


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
    assert run.schedule.num_steps == ours.default_steps == (40 if image else 50)
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
        ("T2V", {}, "either a prompt or prompt_embeds"),
        ("T2V", {"prompt": "a", "prompt_embeds": embeds()}, "either a prompt or prompt_embeds"),
        ("T2V", {"prompt": []}, "at least one prompt"),
        (
            "T2V",
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": embeds()},
            "either a negative_prompt or negative_prompt_embeds",
        ),
        ("T2V", {"prompt": "a", "negative_prompt": ["b", "c"]}, "got 2 for 1"),
        ("T2V", {"prompt": "a", "negative_prompt_embeds": embeds(2)}, "as many and as long"),
        ("T2V", {"prompt_embeds": embeds() * np.nan}, "prompt_embeds has values that are not"),
        ("T2V", TEXT | {"height": 40}, "height must be a positive multiple of 16: got 40"),
        ("T2V", TEXT | {"num_frames": 80}, r"num_frames must be of the form 4k \+ 1: got 80"),
        ("T2V", TEXT | {"width": 1024}, "exceed the 32 that this model has positions for"),
        ("T2V", TEXT | {"num_inference_steps": 1001}, "num_inference_steps must be 1 to 1000"),
        (
            "T2V",
            TEXT | {"scheduler": "unipc", "flow_shift": 0},
            "flow_shift must be a number from 0.01",
        ),
        ("T2V", TEXT | {"guidance_interval": (0, 2)}, "guidance_interval is two shares"),
        (
            "T2V",
            TEXT | {"num_videos_per_prompt": 0},
            "num_videos_per_prompt must be a whole number from 1 to",
        ),
        ("T2V", TEXT | {"seed": -1}, "seed must be a whole number from 0"),
        ("T2V", TEXT | {"latents": LATENTS[:, :3]}, r"latents must have the shape \(1, 4, 3"),
        ("T2V", TEXT | {"image": picture(7)}, "text-to-video checkpoint: it takes no image"),
        ("T2V", TEXT | {"image_latents": LATENTS}, "it takes no image_latents"),
        ("I2V", TEXT, "pass the image of its first frame"),
        ("I2V", TEXT | {"image_embeds": embeds()}, "pass the image of its first frame"),
        ("I2V", TEXT | {"image": picture(7), "last_image": picture(7)}, "takes one image"),
        ("FLF2V", TEXT | {"image": picture(7)}, "between two frames: pass the last_image"),
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


def test_the_command_line_makes_videos_of_an_image(make, tmp_path, monkeypatch, capsys):
    _, _, folder = make("FLF2V")
    for name, seed in (("first.png", 7), ("last.png", 8)):
        picture(seed).save(tmp_path / name)
    size = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    command = ["svg-jax", "generate", f"--model={folder}", "--prompt=a cat", "--steps=2", *size]
    images = [f"--image={tmp_path / 'first.png'}", f"--last-image={tmp_path / 'last.png'}"]
    options = [*images, "--flow-shift=5", "--density=0.6", "--sampled-rows=4", "--dense-steps=0.5"]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", [*command, *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    output = tmp_path / "video.mp4"
    code, printed = run(*options, f"--output={output}")
    assert not code, printed.err
    assert output.stat().st_size > 0
    sparsity, few, *_, wrote, kernel = printed.out.splitlines()
    assert few == "few steps: 1 of 2 dense, the first ones"
    assert kernel.startswith("sparse attention by ")
    assert sparsity == (
        "sparsity: density 0.6, dense steps 0.5, dense layers 0.03, sampled rows 4 "
        "(the paper's wan-i2v-480p but for --density, --sampled-rows, --dense-steps)"
    )
    assert wrote.startswith(f"wrote {output}")
    code, printed = run(*images, "--dynamic-cfg", f"--output={output}")
    assert code == 2
    assert "takes no --dynamic-cfg" in printed.err
    code, printed = run(f"--image={folder / 'model_index.json'}", f"--output={output}")
    assert code == 2
    assert "is no image" in printed.err

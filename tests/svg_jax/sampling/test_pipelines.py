"""The pipelines of all families: against diffusers' own, sparse, refusing, on the command line."""

from functools import partial
from typing import Any

import cogvideox_pipelines
import hunyuan_video_pipelines
import jax
import numpy as np
import pytest
import wan_pipelines
from tiny_pipelines import check_video, picture, run_diffusers
from wan_pipelines import PROMPTS, embeds

from svg_jax.config import SparsityConfig, Warmup

FAMILIES: dict[str, Any] = {
    "CogVideoX": cogvideox_pipelines,
    "HunyuanVideo": hunyuan_video_pipelines,
    "Wan": wan_pipelines,
}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


again = partial(pytest.param, marks=pytest.mark.slow)  # of a variant that has another case
VIDEOS: list[Any] = [
    ("CogVideoX", "5b, VAE", {**cogvideox_pipelines.features(), "guidance_scale": 1.0}),
    again("HunyuanVideo", "T2V", {"prompt": "a cat surfing", "guidance_scale": 6.0}),
    (
        "HunyuanVideo",
        "T2V",
        {
            "prompt": ["a cat surfing a very long wave", ""],
            "negative_prompt": ["blurry", "shaking {}"],
            "true_cfg_scale": 3.0,
            "guidance_scale": 1.5,
        },
    ),
    again("HunyuanVideo", "replace", {"prompt": "a dog", "guidance_scale": 6.0}),
    (
        "HunyuanVideo",
        "replace",
        {
            "prompt": "a dog",
            "negative_prompt": "rain",
            "true_cfg_scale": 2.0,
            "guidance_scale": 1.0,
        },
    ),
    ("HunyuanVideo", "concat", {"prompt": "a dog", "guidance_scale": 1.0}),
    again(
        "HunyuanVideo",
        "concat",
        {"prompt": "a dog", "negative_prompt": "", "true_cfg_scale": 2.0},
    ),
    ("Wan", "T2V", {"prompt": PROMPTS, "negative_prompt": ["ugly", "worst quality"]}),
    again(
        "Wan",
        "T2V",
        {"prompt_embeds": embeds(2, 7), "negative_prompt_embeds": embeds(2, 7, seed=3)},
    ),
    again("Wan", "T2V", {"prompt": PROMPTS, "guidance_scale": 1.0, "max_sequence_length": 6}),
    ("Wan", "I2V", {"prompt": PROMPTS[0], "negative_prompt": "ugly"}),
    again("Wan", "I2V", {"prompt_embeds": embeds(2), "guidance_scale": 1.0}),
    ("Wan", "FLF2V", {"prompt": PROMPTS, "last_image": picture(8, 66, 40)}),
]


@pytest.mark.parametrize(("family", "variant", "arguments"), VIDEOS)
def test_videos_are_those_of_diffusers(family, variant, arguments, pipelines):
    theirs, ours, _ = pipelines[family](variant)
    texts = arguments.get("prompt", arguments.get("prompt_embeds"))
    noise = FAMILIES[family].noise(1 if isinstance(texts, str) else len(texts))
    if variant not in ("T2V", "5b, VAE"):
        image = hunyuan_video_pipelines.picture() if family == "HunyuanVideo" else picture()
        arguments = arguments | {"image": image}
    call = FAMILIES[family].CALL | arguments
    latents, frames = run_diffusers(theirs, noise, **call)
    if variant == "concat":
        latents = latents[:, :, 1:]
    check_video(ours(latents=noise, **call), latents, frames)


@pytest.mark.parametrize(
    ("family", "variant"), [("CogVideoX", "5b"), ("HunyuanVideo", "T2V"), ("Wan", "T2V")]
)
def test_several_prompts_and_videos_of_each(family, variant, pipelines):
    _, ours, _ = pipelines[family](variant)
    call = FAMILIES[family].CALL | {"num_inference_steps": 2, "seed": 5, "guidance_scale": 1}
    call |= {"output_type": "latent"}
    features = FAMILIES[family].features(2)
    both = ours(**features, **call, num_videos_per_prompt=2)
    assert both.latents.shape == (4, *FAMILIES[family].NOISE)
    first = {name: array[:1] for name, array in features.items()}
    alone = ours(**first, **call)
    np.testing.assert_allclose(both.latents[:1], alone.latents, atol=1e-4)
    assert not np.allclose(both.latents[0], both.latents[1], atol=0.1)  # noise of its own


@pytest.mark.parametrize(
    ("family", "variant", "arguments", "warmup", "labels"),
    [
        (
            "CogVideoX",
            "5b",
            {**cogvideox_pipelines.features(), "guidance_scale": 1},
            Warmup(steps=0.4),
            [(2, 1, 2)] * 3,
        ),
        (
            "HunyuanVideo",
            "replace",
            {
                **hunyuan_video_pipelines.features(),
                **hunyuan_video_pipelines.features(prefix="negative_"),
                "image": picture(),
                "true_cfg_scale": 2.0,
                "guidance_interval": (0, 0.5),
                "num_inference_steps": 4,
                "output_type": "uint8",
                "vae_tiling": True,
            },
            Warmup(steps=0.25, layers=0.0),
            [(3, 2, 2), (3, 1, 2), (3, 1, 2)],
        ),
        (
            "Wan",
            "I2V",
            {"prompt": "a cat", "image": np.asarray(picture()), "guidance_interval": (0, 0.75)},
            Warmup(steps=0.4),
            [(2, 2, 2), (2, 2, 2), (2, 1, 2)],
        ),
    ],
)
def test_sparse_steps_follow_the_warm_up(family, variant, arguments, warmup, labels, pipelines):
    _, ours, _ = pipelines[family](variant)
    call = FAMILIES[family].CALL | arguments
    sparsity = SparsityConfig(density=0.6, sampled_rows=4)
    video = ours(**call, sparsity=sparsity, warmup=warmup)
    assert [profile.labels.shape for profile in video.info.profiles] == labels
    assert np.isfinite(video.latents).all()
    if ours.makes_frames:
        assert video.frames.shape == (1, 9, call["height"], call["width"], 3)
        assert np.isfinite(video.frames).all()


# Of every family's text-to-video model; its features come with them where there is no prompt.
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"prompt_embeds": None}, "either a prompt or prompt_embeds"),
    ({"prompt": "a"}, "either a prompt or prompt_embeds"),
    ({"prompt_embeds": None, "prompt": []}, "at least one prompt"),
    (
        {"prompt_embeds": None, "prompt": "a", "negative_prompt": ["b", "c"]},
        "negative_prompt must be one for all or as many as the prompts: got 2 for 1",
    ),
    (
        {"negative_prompt": "b", "negative_prompt_embeds": embeds()},
        "either a negative_prompt or negative_prompt_embeds",
    ),
    (
        {"prompt_embeds": np.full((1, 8, 16), np.nan)},
        "prompt_embeds has values that are not finite",
    ),
    ({"height": 40}, "height must be a positive multiple of 16: got 40"),
    ({"latents": np.zeros((1, 3, 3, 4, 6))}, r"latents must have the shape \(1, [34], [34]"),
    ({"latents": np.full((1, 3, 4, 8, 8), np.nan)}, "latents has values that are not finite"),
    ({"image": picture()}, "text-to-video checkpoint: it takes no image"),
    (
        {"image_latents": np.zeros((1, 1, 4, 8, 8))},
        "checkpoint: it takes no (image and no )?image_latents",
    ),
    ({"guidance_interval": (0.6, 0.5)}, "guidance_interval is two shares"),
    ({"guidance_interval": (0, 2)}, "guidance_interval is two shares"),
    (
        {"num_videos_per_prompt": 0},
        "num_videos_per_prompt must be a whole number from 1 to 9223372036854775807",
    ),
    ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1: got 0"),
    ({"num_inference_steps": 1001}, "num_inference_steps must be 1 to 1000: got 1001"),
    ({"seed": -1}, "seed must be a whole number from 0"),
]


@pytest.mark.parametrize(
    ("family", "variant"), [("CogVideoX", "5b"), ("HunyuanVideo", "T2V"), ("Wan", "T2V")]
)
@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_arguments_that_fit_no_model(family, variant, arguments, message, pipelines):
    _, ours, _ = pipelines[family](variant)
    text = FAMILIES[family].features() | {"guidance_scale": 1}
    with pytest.raises(ValueError, match=message):
        ours(**FAMILIES[family].CALL | text | arguments)


@pytest.mark.parametrize("family", ["HunyuanVideo", "Wan"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 80}, r"num_frames must be of the form 4k \+ 1: got 80"),
        ({"flow_shift": 0}, "flow_shift must be a number from 0.01 to 1000: got 0"),
        ({"flow_shift": -1, "scheduler": "unipc"}, "flow_shift must be a number from 0.01"),
        ({"use_dynamic_cfg": True}, "this model takes no use_dynamic_cfg"),
    ],
)
def test_arguments_that_fit_no_flow_matching_model(family, arguments, message, pipelines):
    _, ours, _ = pipelines[family]("T2V")
    with pytest.raises(ValueError, match=message):
        ours("a", **FAMILIES[family].CALL | arguments)


@pytest.mark.parametrize(
    ("family", "variant", "options", "warning", "shown"),
    [
        (
            "HunyuanVideo",
            "replace",
            ["--attention=dense", "--true-cfg-scale=2"],
            "",
            ["wrote video.mp4 (", "dense attention in float32"],
        ),
        (
            "Wan",
            "FLF2V",
            [
                *("--last-image=last.png", "--flow-shift=5"),
                # Told once in a process: no other test has this density.
                *("--density=0.61", "--sampled-rows=4", "--dense-steps=0.5"),
            ],
            "svg-jax: density 0.61 was asked for, but 1.0000 is computed: ",
            [
                "sparsity: density 0.61, dense steps 0.5, dense layers 0.03, sampled rows 4 "
                "(the paper's wan-i2v-480p but for --density, --sampled-rows, --dense-steps)",
                "few steps: 1 of 2 dense, the first ones",
                "wrote video.mp4 (",
                "sparse attention by ",
            ],
        ),
    ],
)
def test_the_command_line_makes_videos_of_images(
    family, variant, options, warning, shown, pipelines, run, tmp_path
):
    _, _, folder = pipelines[family](variant)
    for name, seed in (("first.png", 7), ("last.png", 8)):
        picture(seed).save(tmp_path / name)
    size = ["--height=32", "--width=48", "--num-frames=9", "--steps=2", "--output=video.mp4"]
    command = ["generate", f"--model={folder}", "--prompt=a cat", *size]
    run()  # what the libraries print when they write the checkpoint
    result = run(*command, "--image=first.png", *options)
    assert result.code == 0, result.err
    assert result.err.startswith(warning)
    assert result.err.count("\n") == bool(warning)
    assert (tmp_path / "video.mp4").stat().st_size > 0
    told, table, _ = result.out.partition("where the time went")
    assert table
    lines = told.splitlines()
    assert len(lines) >= len(shown)
    for line, beginning in zip([*lines[: len(shown) - 2], *lines[-2:]], shown, strict=True):
        assert line.startswith(beginning)
    result = run(*command, "--image=first.png", "--dynamic-cfg")
    assert (result.code, result.err) == (2, "svg-jax: this model takes no --dynamic-cfg\n")
    result = run(*command, f"--image={folder / 'model_index.json'}")
    assert result.code == 2
    assert "is no image" in result.err

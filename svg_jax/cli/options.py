"""The options that commands of the command line share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Attention(StrEnum):
    """How generate attends."""

    dense = "dense"
    svg = "svg"


class PatternName(StrEnum):
    """What compare takes heads for."""

    svg = "svg"
    spatial = "spatial"
    temporal = "temporal"
    random = "random"


class SamplerName(StrEnum):
    """The samplers: the first two are CogVideoX's, the others those of flow matching."""

    ddim = "ddim"
    dpm = "dpm"
    euler = "euler"
    unipc = "unipc"


class Dtype(StrEnum):
    """What matrix products are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


# Options that are not called like the field that they give.
RENAMED = {
    "num_inference_steps": "--steps",
    "use_dynamic_cfg": "--dynamic-cfg",
    "json_file": "--json",
    "warmup.steps": "--dense-steps",
    "warmup.layers": "--dense-layers",
}


def flag_of(field: str) -> str:
    """Name the option that gives a field, as `--num-frames` gives `num_frames`."""
    return RENAMED.get(field, "--" + field.replace("_", "-"))


def option(*names: str, help: str, **settings: Any):
    """Make an option of these names; `settings` are typer's."""
    return typer.Option(*names, help=help, **settings)


Model = Annotated[
    str,
    option(
        "--model",
        help="A converted folder (svg-jax convert), or a folder in diffusers' layout or a hub id, "
        "which is converted once into $SVG_JAX_CACHE (~/.cache/svg-jax); tiny: the bundled model.",
    ),
]
Revision = Annotated[
    str | None, option("--revision", help="Branch, tag or commit of a hub id; default: main.")
]
ModelVariant = Annotated[
    str | None,
    option(
        "--variant", help="Which weights of a hub id or of a diffusers folder to take, e.g. fp16."
    ),
]
Verify = Annotated[
    bool,
    option("--verify", help="Read all weights first, and compare them with what was converted."),
]
Prompt = Annotated[str | None, option("--prompt", help="Text of what the video shows.")]
Negative = Annotated[
    str, option("--negative-prompt", help="Text of what guidance leads away from.")
]
Embeds = Annotated[
    Path | None,
    option(
        "--prompt-embeds",
        help="Text features in place of a prompt: .npy, or .npz with prompt_embeds [1, tokens, "
        "features] and, for guidance, negative_prompt_embeds; HunyuanVideo needs "
        "pooled_prompt_embeds and prompt_attention_mask beside each.",
    ),
]
Height = Annotated[int | None, option("--height", help="Height in pixels; default: as trained.")]
Width = Annotated[int | None, option("--width", help="Width in pixels; default: as trained.")]
Frames = Annotated[
    int | None, option("--num-frames", help="Number of frames; default: as trained.")
]
Steps = Annotated[
    int | None, option("--steps", help="Number of denoising steps; default: the model's.")
]
Guidance = Annotated[
    float | None,
    option("--guidance-scale", help="Strength of guidance; 1 or less: none. Default: the model's."),
]
TrueCfg = Annotated[
    float | None,
    option(
        "--true-cfg-scale",
        help="Strength of HunyuanVideo's guidance away from the negative prompt; default: 1, none.",
    ),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    option(
        "--guidance-interval",
        help="Shares of the steps between which guidance is computed: 0 0.3 is the first 30 %. "
        "Default: the model's, or all steps.",
    ),
]
DynamicCfg = Annotated[
    bool, option("--dynamic-cfg", help="Vary guidance over the run, as diffusers does (CogVideoX).")
]
FlowShift = Annotated[
    float | None,
    option(
        "--flow-shift",
        help="Shift of the noise levels (HunyuanVideo, Wan); default: the checkpoint's own.",
    ),
]
Image = Annotated[
    Path | None,
    option("--image", help="Image that the video begins with, for image-to-video models."),
]
LastImage = Annotated[
    Path | None,
    option("--last-image", help="Image that the video ends with, for Wan's FLF2V models."),
]
Seed = Annotated[
    int,
    option(
        "--seed",
        help="Seed of the noise, 0 to 2^64 - 1: the same one gives the same noise anywhere.",
    ),
]
Latents = Annotated[
    Path | None, option("--latents", help="Initial noise in place of the seed's: .npy or .npz.")
]
ImageLatents = Annotated[
    Path | None,
    option("--image-latents", help="Latents of the first frame in place of --image: .npy or .npz."),
]
Density = Annotated[
    float | None,
    option(
        "--density",
        help="Share of attention that is computed, over 0 to 1; default: what the model's folder "
        "says, else the paper's for the model and size.",
    ),
]
DenseSteps = Annotated[
    float | None,
    option(
        "--dense-steps",
        help="Share of the steps, from the first on, that stay dense; default: as for --density.",
    ),
]
DenseLayers = Annotated[
    float | None,
    option(
        "--dense-layers",
        help="Share of the layers, from the first on, that stay dense; default: as for --density.",
    ),
]
SampledRows = Annotated[
    int | None,
    option(
        "--sampled-rows",
        help="Number of query rows by which heads are profiled; default: as for --density.",
    ),
]
FirstFrameSink = Annotated[
    bool | None,
    option(
        "--first-frame-sink/--no-first-frame-sink",
        help="Whether every token attends to the whole first frame; default: as the paper does for "
        "the model (Wan: yes).",
    ),
]
BandMultiple = Annotated[
    int | None,
    option(
        "--band-multiple",
        help="Number of tokens that the band's width is rounded to a multiple of; default: 128.",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    option(
        "--dtype", help="Dtype of the computation; default: bfloat16 on a GPU, float32 on a CPU."
    ),
]
Scheduler = Annotated[
    SamplerName | None,
    option(
        "--scheduler",
        help="Sampler: ddim or dpm for CogVideoX, euler or unipc for the others; default: the "
        "checkpoint's own.",
    ),
]
Fps = Annotated[
    float | None, option("--fps", help="Frames per second of the video; default: as trained.")
]
Enlarge = Annotated[
    int | None,
    option(
        "--enlarge",
        help="Factor by which the shown video is larger, each way; default: the model's, or 1.",
    ),
]

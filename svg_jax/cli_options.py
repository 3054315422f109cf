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
Revision = Annotated[str | None, option("--revision", help="Of a hub id: a branch, tag or commit.")]
ModelVariant = Annotated[
    str | None,
    option("--variant", help="Of a hub id or a folder of diffusers: weights to take, e.g. fp16."),
]
Verify = Annotated[
    bool, option("--verify", help="Read all weights first and compare them with the manifest.")
]
Prompt = Annotated[str | None, option("--prompt", help="What to show.")]
Negative = Annotated[str, option("--negative-prompt", help="What guidance leads away from.")]
Embeds = Annotated[
    Path | None,
    option(
        "--prompt-embeds",
        help="Text features in place of a prompt: .npy, or .npz with prompt_embeds [1, tokens, "
        "features] and, for guidance, negative_prompt_embeds; HunyuanVideo needs "
        "pooled_prompt_embeds and prompt_attention_mask beside each.",
    ),
]
Height = Annotated[int | None, option("--height", help="In pixels; default: as trained.")]
Width = Annotated[int | None, option("--width", help="In pixels; default: as trained.")]
Frames = Annotated[int | None, option("--num-frames", help="Default: as trained.")]
Steps = Annotated[int | None, option("--steps", help="Denoising steps; default: the model's.")]
Guidance = Annotated[
    float | None,
    option("--guidance-scale", help="1 or less: no guidance. Default: the model's."),
]
TrueCfg = Annotated[
    float | None,
    option("--true-cfg-scale", help="HunyuanVideo's guidance away from the negative prompt."),
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    option(
        "--guidance-interval",
        help="From which to which share of the steps guidance is paid for: 0 0.3, the first 30 %. "
        "Default: the model's, or all.",
    ),
]
DynamicCfg = Annotated[bool, option("--dynamic-cfg", help="Vary guidance over the run.")]
FlowShift = Annotated[
    float | None, option("--flow-shift", help="Default: the checkpoint's own (flow matching).")
]
Image = Annotated[
    Path | None, option("--image", help="What the video begins with, for image to video.")
]
LastImage = Annotated[
    Path | None, option("--last-image", help="What it ends with, for models that take both.")
]
Seed = Annotated[int, option("--seed", help="The same seed gives the same noise anywhere.")]
Latents = Annotated[
    Path | None, option("--latents", help="Initial noise in place of the seed's: .npy or .npz.")
]
ImageLatents = Annotated[
    Path | None,
    option("--image-latents", help="Of the first frame, for image to video: .npy or .npz."),
]
Density = Annotated[
    float | None,
    option(
        "--density",
        help="Share of attention that is computed. Default, as of the next three: what the model's "
        "folder says, or else the paper's for the model and size.",
    ),
]
DenseSteps = Annotated[
    float | None,
    option("--dense-steps", help="Share of the steps, from the first on, that stay dense."),
]
DenseLayers = Annotated[
    float | None,
    option("--dense-layers", help="Share of the layers, from the first on, that stay dense."),
]
SampledRows = Annotated[
    int | None, option("--sampled-rows", help="Query rows from which heads are told apart.")
]
DtypeOption = Annotated[
    Dtype | None,
    option("--dtype", help="Of computation; default: bfloat16 on a GPU, float32 on a CPU."),
]
Scheduler = Annotated[
    SamplerName | None, option("--scheduler", help="Default: the checkpoint's own.")
]
Fps = Annotated[
    float | None, option("--fps", help="Frames per second of the video; default: as trained.")
]
Enlarge = Annotated[
    int | None,
    option("--enlarge", help="Pixels to show each pixel as, each way; default: the model's, or 1."),
]

"""The options that commands of the command line share."""

import inspect
from enum import StrEnum
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


class Dtype(StrEnum):
    """What matrix products are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


# Options of the fields of a value in the settings.
OF_WARMUP = {"warmup.steps": "--dense-steps", "warmup.layers": "--dense-layers"}


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


def _parameter(name: str, annotation: Any, **default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, **default)


# Options that several commands have, by the value that they make.
MODEL = (
    _parameter("model", Model),
    _parameter("revision", Revision, default=None),
    _parameter("variant", ModelVariant, default=None),
    _parameter("verify", Verify, default=False),
    _parameter("dtype", DtypeOption, default=None),
)
SPARSITY = (
    _parameter("density", Density, default=None),
    _parameter("sampled_rows", SampledRows, default=None),
    _parameter("first_frame_sink", FirstFrameSink, default=None),
    _parameter("band_multiple", BandMultiple, default=None),
)
WARMUP = (
    _parameter("dense_steps", DenseSteps, default=None),
    _parameter("dense_layers", DenseLayers, default=None),
)

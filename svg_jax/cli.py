"""The command line: `svg-jax generate | compare | demo`, and those of `cli_checkpoints.py`.

Commands are imported when they run: `svg-jax --help` needs no jax.
"""

import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from svg_jax.cli_checkpoints import CHECKPOINT_COMMANDS
from svg_jax.config import SparsityConfig

_SPARSITY = SparsityConfig()
# Exit codes: 0 done, 1 the run itself failed (values that are not finite), and
_BAD_INPUT = 2  # wrong usage, or what was given is not what it must be
_ENVIRONMENT = 3  # the disk, a right, a lock, the device's memory
_INTERRUPTED = 130  # Ctrl-C. (DamageError has 4: a folder is not what was converted.)
# RuntimeError is what JAX raises when memory runs out.
_EXPECTED = (ValueError, OSError, FloatingPointError, RuntimeError)

app = typer.Typer(
    help="Sparse VideoGen in JAX: video diffusion transformers with sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


for command in CHECKPOINT_COMMANDS:
    app.command()(command)


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


def _option(*names: str, help: str):
    return typer.Option(*names, help=help)


Model = Annotated[Path, _option("--model", help="A converted folder (svg-jax convert).")]
Prompt = Annotated[str | None, _option("--prompt", help="What to show.")]
Negative = Annotated[str, _option("--negative-prompt", help="What guidance leads away from.")]
Embeds = Annotated[
    Path | None,
    _option(
        "--prompt-embeds",
        help="Text features in place of a prompt: .npy, or .npz with prompt_embeds [1, tokens, "
        "features] and, for guidance, negative_prompt_embeds; HunyuanVideo needs "
        "pooled_prompt_embeds and prompt_attention_mask beside each.",
    ),
]
Height = Annotated[int | None, _option("--height", help="In pixels; default: as trained.")]
Width = Annotated[int | None, _option("--width", help="In pixels; default: as trained.")]
Frames = Annotated[int | None, _option("--num-frames", help="Default: as trained.")]
Steps = Annotated[int, _option("--steps", help="Denoising steps.")]
Guidance = Annotated[
    float | None,
    _option("--guidance-scale", help="1 or less: no guidance. Default: the model's."),
]
TrueCfg = Annotated[
    float | None,
    _option("--true-cfg-scale", help="HunyuanVideo's guidance away from the negative prompt."),
]
GuidanceSteps = Annotated[
    float,
    _option("--guidance-steps", help="Share of the steps, from the first, that pay for guidance."),
]
DynamicCfg = Annotated[bool, _option("--dynamic-cfg", help="Vary guidance over the run.")]
FlowShift = Annotated[
    float | None, _option("--flow-shift", help="Default: the checkpoint's own (flow matching).")
]
Image = Annotated[
    Path | None, _option("--image", help="What the video begins with, for image to video.")
]
LastImage = Annotated[
    Path | None, _option("--last-image", help="What it ends with, for models that take both.")
]
Seed = Annotated[int, _option("--seed", help="The same seed gives the same noise anywhere.")]
Latents = Annotated[
    Path | None, _option("--latents", help="Initial noise in place of the seed's: .npy or .npz.")
]
ImageLatents = Annotated[
    Path | None,
    _option("--image-latents", help="Of the first frame, for image to video: .npy or .npz."),
]
Density = Annotated[float, _option("--density", help="Share of attention that is computed.")]
DenseSteps = Annotated[
    float, _option("--dense-steps", help="Share of the steps, from the first, that stay dense.")
]
DenseLayers = Annotated[
    float, _option("--dense-layers", help="Share of the layers, from the first, that stay dense.")
]
SampledRows = Annotated[
    int, _option("--sampled-rows", help="Query rows from which heads are told apart.")
]
DtypeOption = Annotated[
    Dtype | None,
    _option("--dtype", help="Of computation; default: bfloat16 on a GPU, float32 on a CPU."),
]
Scheduler = Annotated[
    SamplerName | None, _option("--scheduler", help="Default: the checkpoint's own.")
]
Fps = Annotated[
    float | None, _option("--fps", help="Frames per second of the video; default: as trained.")
]
Enlarge = Annotated[int, _option("--enlarge", help="Pixels to show each pixel as, each way.")]


@app.command()
def generate(
    model: Model,
    output: Annotated[
        Path, _option("--output", "-o", help=".mp4, .gif or .png; .npz for the latents.")
    ],
    prompt: Prompt = None,
    negative_prompt: Negative = "",
    prompt_embeds: Embeds = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = 50,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    guidance_steps: GuidanceSteps = 1.0,
    dynamic_cfg: DynamicCfg = False,
    seed: Seed = 0,
    image: Image = None,
    last_image: LastImage = None,
    latents: Latents = None,
    image_latents: ImageLatents = None,
    attention: Annotated[
        Attention, _option("--attention", help="Dense, or Sparse VideoGen.")
    ] = Attention.svg,
    density: Density = _SPARSITY.density,
    dense_steps: DenseSteps = _SPARSITY.dense_steps,
    dense_layers: DenseLayers = _SPARSITY.dense_layers,
    sampled_rows: SampledRows = _SPARSITY.sampled_rows,
    dtype: DtypeOption = None,
    scheduler: Scheduler = None,
    flow_shift: FlowShift = None,
    fps: Fps = None,
    enlarge: Enlarge = 1,
    labels_out: Annotated[
        Path | None,
        _option("--labels-out", help="Write what profiling found out: .npz."),
    ] = None,
) -> None:
    """Generate a video from a prompt."""
    from svg_jax import commands

    sparsity = None
    if attention is Attention.svg:
        sparsity = SparsityConfig(density, dense_steps, dense_layers, sampled_rows)
    commands.generate(
        model,
        output,
        sparsity=sparsity,
        dtype=dtype,
        fps=fps,
        enlarge=enlarge,
        labels_out=labels_out,
        files={
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "image_latents": image_latents,
        },
        image=image,
        last_image=last_image,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        guidance_steps=guidance_steps,
        use_dynamic_cfg=dynamic_cfg or None,
        scheduler=scheduler,
        flow_shift=flow_shift,
        seed=seed,
    )


@app.command()
def compare(
    model: Model,
    prompt: Prompt = None,
    output: Annotated[
        Path, _option("--output", "-o", help="Both videos, as OUTPUT.mp4 and OUTPUT.gif.")
    ] = Path("compare"),
    negative_prompt: Negative = "",
    prompt_embeds: Embeds = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = 50,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    guidance_steps: GuidanceSteps = 1.0,
    dynamic_cfg: DynamicCfg = False,
    seed: Seed = 0,
    image: Image = None,
    last_image: LastImage = None,
    latents: Latents = None,
    image_latents: ImageLatents = None,
    pattern: Annotated[
        PatternName, _option("--pattern", help="Profile heads, or take all for one kind.")
    ] = PatternName.svg,
    density: Density = _SPARSITY.density,
    dense_steps: DenseSteps = _SPARSITY.dense_steps,
    dense_layers: DenseLayers = _SPARSITY.dense_layers,
    sampled_rows: SampledRows = _SPARSITY.sampled_rows,
    dtype: DtypeOption = None,
    scheduler: Scheduler = None,
    flow_shift: FlowShift = None,
    fps: Fps = None,
    enlarge: Enlarge = 1,
    json_file: Annotated[Path | None, _option("--json", help="Write the figures.")] = None,
) -> None:
    """Generate a video with dense and with sparse attention, and compare the two."""
    from svg_jax import commands

    commands.compare(
        model,
        output,
        sparsity=SparsityConfig(density, dense_steps, dense_layers, sampled_rows),
        pattern=pattern.value,
        dtype=dtype,
        fps=fps,
        enlarge=enlarge,
        json_file=json_file,
        files={
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "image_latents": image_latents,
        },
        image=image,
        last_image=last_image,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        guidance_steps=guidance_steps,
        use_dynamic_cfg=dynamic_cfg or None,
        scheduler=scheduler,
        flow_shift=flow_shift,
        seed=seed,
    )


@app.command()
def demo(
    prompt: Annotated[
        str, _option("--prompt", help="The bundled model knows few words: an error lists them.")
    ] = "a red three moving left over the flower",
    seed: Seed = 0,
    output: Annotated[
        Path, _option("--output", "-o", help="Both videos, as OUTPUT.mp4 and OUTPUT.gif.")
    ] = Path("demo"),
    source: Annotated[
        Path | None,
        _option("--source", help="Another pipeline folder in diffusers' layout."),
    ] = None,
) -> None:
    """Convert the bundled tiny model, and compare dense and sparse attention on it."""
    from svg_jax import commands

    commands.demo(prompt, seed=seed, output=output, source=source)


def main() -> None:
    """Runs the command line; an error is one sentence and one of the exit codes above."""
    warnings.showwarning = _show_warning
    logger = logging.getLogger("svg_jax")
    logger.handlers, logger.propagate = [_Echo()], False  # else absl's handler says it again
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if os.environ.get("SVG_JAX_TRACEBACK"):
            raise
        # Usage errors (typer's own click and click itself have different classes for them) and
        # those of the converter say it themselves.
        code = getattr(error, "exit_code", None)
        if code is None and not isinstance(error, _EXPECTED):
            raise
        if message := _sentence(error):  # without arguments help was printed, and this is empty
            typer.echo(f"svg-jax: {message}", err=True)
        code = _exit_code(error) if code is None else code
    if code == _INTERRUPTED:
        # The temporary files are gone. A step may still be running on other threads, and Python's
        # own way out would take its memory away and crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code(error: Exception) -> int:
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return _BAD_INPUT
    return _ENVIRONMENT if isinstance(error, OSError) or _is_out_of_memory(error) else 1


def _is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if _is_out_of_memory(error):
        return "the device ran out of memory: ask for fewer frames or a smaller size"
    message = getattr(error, "format_message", error.__str__)()
    return " ".join(message.split())


class _Echo(logging.Handler):
    """Says what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"svg-jax: {record.getMessage()}", err=True)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    del filename, lineno, file, line
    if issubclass(category, UserWarning):
        typer.echo(f"svg-jax: {message}", err=True)

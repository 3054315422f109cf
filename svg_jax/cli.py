"""The command line: `svg-jax generate | compare | demo`, and those of `cli_checkpoints.py`.

Commands are imported when they run: `svg-jax --help` needs no jax.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from svg_jax.cli_checkpoints import CHECKPOINT_COMMANDS
from svg_jax.cli_options import (
    Attention,
    DenseLayers,
    DenseSteps,
    Density,
    DtypeOption,
    DynamicCfg,
    Embeds,
    Enlarge,
    FlowShift,
    Fps,
    Frames,
    Guidance,
    GuidanceInterval,
    Height,
    Image,
    ImageLatents,
    LastImage,
    Latents,
    Model,
    ModelVariant,
    Negative,
    PatternName,
    Prompt,
    Revision,
    SampledRows,
    Scheduler,
    Seed,
    Steps,
    TrueCfg,
    Width,
)
from svg_jax.cli_options import option as _option

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


@app.command()
def generate(
    model: Model,
    output: Annotated[
        Path,
        _option(
            "--output",
            "-o",
            help=".mp4, .gif or .png; .npz for the latents. With --prompts a folder, or a pattern "
            "such as out/{index:03d}.gif; the first index is 0.",
        ),
    ],
    prompt: Prompt = None,
    prompts: Annotated[
        Path | None,
        _option(
            "--prompts",
            help="A file of prompts, one a line; blank lines and # comments are skipped, and "
            "videos that are there from an earlier call.",
        ),
    ] = None,
    negative_prompt: Negative = "",
    prompt_embeds: Embeds = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    guidance_interval: GuidanceInterval = (0.0, 1.0),
    dynamic_cfg: DynamicCfg = False,
    seed: Seed = 0,
    image: Image = None,
    last_image: LastImage = None,
    latents: Latents = None,
    image_latents: ImageLatents = None,
    attention: Annotated[
        Attention, _option("--attention", help="Dense, or Sparse VideoGen.")
    ] = Attention.svg,
    density: Density = None,
    dense_steps: DenseSteps = None,
    dense_layers: DenseLayers = None,
    sampled_rows: SampledRows = None,
    revision: Revision = None,
    variant: ModelVariant = None,
    dtype: DtypeOption = None,
    scheduler: Scheduler = None,
    flow_shift: FlowShift = None,
    fps: Fps = None,
    enlarge: Enlarge = 1,
    labels_out: Annotated[
        Path | None,
        _option("--labels-out", help="Write what profiling found out: .npz."),
    ] = None,
    save_every: Annotated[
        int,
        _option(
            "--save-every",
            help="Save the run's state, as .OUTPUT.state, every so many steps; 0: never.",
        ),
    ] = 5,
    resume: Annotated[
        bool, _option("--resume", help="Go on from the saved state; start if there is none.")
    ] = False,
) -> None:
    """Generate a video from a prompt, or one from each line of a file.

    A run that was stopped, by Ctrl-C or otherwise, goes on with the same command and --resume.
    """
    from svg_jax import commands

    sparsity = _sparsity(density, dense_steps, dense_layers, sampled_rows)
    commands.generate(
        model,
        output,
        sparsity=sparsity if attention is Attention.svg else None,
        revision=revision,
        variant=variant,
        dtype=dtype,
        fps=fps,
        enlarge=enlarge,
        labels_out=labels_out,
        save_every=save_every,
        resume=resume,
        files={
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "image_latents": image_latents,
        },
        image=image,
        last_image=last_image,
        prompt=prompt,
        prompts=prompts,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        guidance_interval=guidance_interval,
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
    steps: Steps = None,
    guidance_scale: Guidance = None,
    true_cfg_scale: TrueCfg = None,
    guidance_interval: GuidanceInterval = (0.0, 1.0),
    dynamic_cfg: DynamicCfg = False,
    seed: Seed = 0,
    image: Image = None,
    last_image: LastImage = None,
    latents: Latents = None,
    image_latents: ImageLatents = None,
    pattern: Annotated[
        PatternName, _option("--pattern", help="Profile heads, or take all for one kind.")
    ] = PatternName.svg,
    density: Density = None,
    dense_steps: DenseSteps = None,
    dense_layers: DenseLayers = None,
    sampled_rows: SampledRows = None,
    revision: Revision = None,
    variant: ModelVariant = None,
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
        sparsity=_sparsity(density, dense_steps, dense_layers, sampled_rows),
        pattern=pattern.value,
        revision=revision,
        variant=variant,
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
        guidance_interval=guidance_interval,
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


def _sparsity(
    density: float | None,
    dense_steps: float | None,
    dense_layers: float | None,
    sampled_rows: int | None,
) -> dict[str, float | int]:
    """What was given of SparsityConfig's fields."""
    options = {
        "density": density,
        "dense_steps": dense_steps,
        "dense_layers": dense_layers,
        "sampled_rows": sampled_rows,
    }
    return {name: value for name, value in options.items() if value is not None}


def main() -> None:
    """Runs the command line; an error is one sentence and one of the exit codes above."""
    warnings.showwarning = _show_warning
    logger = logging.getLogger("svg_jax")
    logger.handlers, logger.propagate = [_Echo()], False  # else absl's handler says it again
    logger.setLevel(logging.INFO)
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
    of_paths = FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError
    if isinstance(error, (ValueError, *of_paths)):
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

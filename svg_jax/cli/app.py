"""The command line: `svg-jax generate | compare | demo`, and those of `checkpoint_commands.py`.

What a command does is imported when it runs, so that `svg-jax --help` needs no jax.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import svg_jax
from svg_jax.cli.checkpoint_commands import CHECKPOINT_COMMANDS
from svg_jax.cli.console import forgiving_streams, say, tell, tell_lines
from svg_jax.cli.errors import ExitCode, failure_of, in_options
from svg_jax.cli.generated import KINDS, OF_WARMUP, SPARSITY, WARMUP, parameters_of
from svg_jax.cli.options import Given, JsonFile, parameter, with_options
from svg_jax.cli.signals import ended_by_signals
from svg_jax.sampling.settings import RunSettings
from svg_jax.sampling.settings.fields import ATTENTION, OUTPUT, PROMPT, SAVING

app = typer.Typer(
    help="Sparse VideoGen in JAX: video diffusion transformers with sparse attention.\n\n"
    "Example: svg-jax demo",
    epilog="Exit codes: 0 done; 1 values that are not finite; 2 wrong usage or bad input; 3 the "
    "system refused (disk space, permissions, memory, another run, a missing package); 4 damaged "
    "converted folder; 70 internal error; 130 Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMPLETION = "_SVG_JAX_COMPLETE"  # of click's protocol, set by the script that typer installs
_MODEL = "Model"
_of_model = partial(parameter, panel=_MODEL)
MODEL = (
    _of_model(
        "model",
        str,
        "Model to run: a converted folder (svg-jax convert); a folder in diffusers' layout or a "
        "hub id, which is converted once into $SVG_JAX_CACHE (~/.cache/svg-jax); or tiny, the "
        "bundled model.",
        required=True,
    ),
    _of_model("revision", str, "Branch, tag or commit of a hub id; default: main."),
    _of_model("variant", str, "Variant of the weights where there are several, e.g. fp16."),
    _of_model("verify", bool, "Read all weights first, and compare them with the manifest."),
    _of_model(
        "dtype",
        Literal["float32", "bfloat16"],
        "Dtype of the computation; default: bfloat16 on a GPU, float32 on a CPU.",
    ),
)
VideoPath = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="Video to write, with both side by side: .mp4, .gif or .png; a name without suffix "
        "writes both .mp4 and .gif.",
        rich_help_panel=OUTPUT,
    ),
]

_video_command = app.command(rich_help_panel="Videos")


@_video_command
@with_options(model=MODEL, sparsity=SPARSITY, warmup=WARMUP, given=parameters_of(*KINDS))
def generate(
    model: Given,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .mp4, .gif or .png for the video, .npz for the latents. With "
            "--prompts, a folder or a pattern such as out/{index:03d}.gif; indices start at 0.",
            rich_help_panel=OUTPUT,
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File with a prompt on each line, in place of --prompt. Blank lines and # "
            "comments are skipped. Videos that already exist are skipped.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    attention: Annotated[
        Literal["dense", "svg"] | None,
        typer.Option(
            help="Dense attention, or Sparse VideoGen; default: svg; dense on GPUs where dense is "
            "faster, unless an option of sparse attention is given.",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    labels_out: Annotated[
        Path | None,
        typer.Option(
            help="File (.npz) to write each sparse step's head labels, errors and density to.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_file: JsonFile = None,
    *,
    sparsity: Given,
    warmup: Given,
    given: Given,
) -> None:
    """Generate a video from a prompt, or one from each line of a file.

    A run that was stopped, by Ctrl-C or otherwise, continues with the same command and --resume.

    Example: svg-jax generate --model tiny --prompt "a pink two circling over the cat" -o two.gif
    """
    from svg_jax.cli import videos

    videos.generate(
        model,
        output,
        given,
        attention=attention,
        sparsity=sparsity,
        warmup=_warmup(warmup),
        prompts=prompts,
        labels_out=labels_out,
        json_file=json_file,
    )


@_video_command
@with_options(
    model=MODEL,
    sparsity=SPARSITY,
    warmup=WARMUP,
    given=parameters_of(
        *KINDS,
        where=lambda name, setting: setting.panel != SAVING and name != "num_videos_per_prompt",
    ),
)
def compare(
    model: Given,
    output: VideoPath = Path("compare"),
    pattern: Annotated[
        Literal["svg", "spatial", "temporal", "random"],
        typer.Option(
            help="How heads are labelled: by profiling (svg), all spatial, all temporal, or "
            "at random.",
            rich_help_panel=ATTENTION,
        ),
    ] = "svg",
    json_file: JsonFile = None,
    *,
    sparsity: Given,
    warmup: Given,
    given: Given,
) -> None:
    """Generate a video with dense and with sparse attention, and compare the two.

    Both begin with the same noise. PSNR and SSIM tell how much sparsity changes the dense video,
    not how good either video is.

    Example: svg-jax compare --model tiny --prompt "a blue five standing still over the stars"
    """
    from svg_jax.cli import comparisons

    comparisons.compare(
        model,
        output,
        given,
        sparsity=sparsity,
        warmup=_warmup(warmup),
        pattern=pattern,
        json_file=json_file,
    )


@_video_command
@with_options(
    sparsity=SPARSITY[:1],  # the density alone
    given=parameters_of(
        RunSettings, where=lambda name, setting: name in ("num_inference_steps", "seed")
    ),
)
def demo(
    prompt: Annotated[
        str,
        typer.Option(
            help="Text that describes the video; an error lists the few words that the "
            "model knows.",
            rich_help_panel=PROMPT,
        ),
    ] = "a red three moving left over the flower",
    output: VideoPath = Path("demo"),
    source: Annotated[
        Path | None,
        typer.Option(
            help="Folder in diffusers' layout to use in place of the bundled model.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    *,
    sparsity: Given,
    given: Given,
) -> None:
    """Compare dense and sparse attention on the bundled model, which is called tiny.

    Example: svg-jax demo --density 0.2 --steps 30
    """
    from svg_jax.cli import comparisons

    comparisons.demo({"prompt": prompt, **given}, sparsity=sparsity, output=output, source=source)


for command in CHECKPOINT_COMMANDS:
    app.command(rich_help_panel="Checkpoints")(command)


def _warmup(given: Given) -> dict[str, Any]:
    """Name the given fields of a Warmup, as steps of --dense-steps."""
    return {name.removeprefix("dense_"): value for name, value in given.items()}


def _print_version(wanted: bool) -> bool:
    """Print the version and exit, for the option."""
    if wanted:
        say(f"svg-jax {svg_jax.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Print the traceback of any error. May stand anywhere in a command."
        ),
    ] = False,
) -> None:
    """Define the options that stand before a command; `main` reads --debug."""
    del version, debug


def main() -> None:
    """Run the command line; an error becomes one sentence and an exit code (see `errors.py`)."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if _COMPLETION in os.environ:  # the shell asks what could come next
        typer.main.get_command(app)(prog_name="svg-jax")
    with forgiving_streams():
        code = _run(arguments, debug=len(arguments) < len(sys.argv) - 1)
    if code == ExitCode.INTERRUPTED:
        # The temporary files are gone. A step may still run on other threads: Python's own exit
        # would free its memory, and crash.
        os._exit(code)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    """Run a command and return its exit code."""
    warnings.showwarning = _show_warning
    command = typer.main.get_command(app)
    options = _options_of(command, arguments)
    logger = logging.getLogger("svg_jax")
    logger.handlers, logger.propagate = [_Echo(options)], False  # else absl's handler repeats it
    logger.setLevel(logging.INFO)
    # Orbax logs the tracebacks of its threads there, and raises the errors as well.
    logging.getLogger("absl").disabled = not debug
    try:
        with ended_by_signals(), command.make_context("svg-jax", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:  # after --help or --version
        return end.exit_code
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            tell_lines(traceback.format_exception(error))
        failure = failure_of(error, options)
        if failure.sentence:
            tell(failure.sentence)
        return failure.code
    return 0


def _options_of(group: Any, arguments: list[str]) -> dict[str, str]:
    """Collect the options of the called command by field."""
    command = next((group.commands[name] for name in arguments if name in group.commands), group)
    options = [given for given in command.params if given.param_type_name == "option"]
    flags = {option.name: option.opts[0] for option in options}
    return flags | {name: flag for name, flag in OF_WARMUP.items() if flag in flags.values()}


class _Echo(logging.Handler):
    """Print the messages that the package logs, in which options stand for arguments."""

    def __init__(self, options: Mapping[str, str]):
        super().__init__()
        self._options = options

    def emit(self, record: logging.LogRecord) -> None:
        tell(in_options(record.getMessage(), self._options))


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    del filename, lineno, file, line
    if issubclass(category, UserWarning):
        tell(str(message))

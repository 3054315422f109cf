"""The command line: `svg-jax generate | compare | demo`, and those of `checkpoint_commands.py`.

Commands are imported when they run: `svg-jax --help` needs no jax.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import svg_jax
from svg_jax.cli.checkpoint_commands import CHECKPOINT_COMMANDS
from svg_jax.cli.console import forgiving_streams, say, tell, tell_lines
from svg_jax.cli.errors import ExitCode, failure_of
from svg_jax.cli.generated import KINDS, parameters_of, with_options
from svg_jax.cli.options import (
    MODEL,
    OF_WARMUP,
    SPARSITY,
    WARMUP,
    Attention,
    Density,
    PatternName,
)
from svg_jax.cli.options import option as _option
from svg_jax.cli.signals import ended_by_signals
from svg_jax.sampling.settings import RunSettings
from svg_jax.sampling.settings.run import SAVING

app = typer.Typer(
    help="Sparse VideoGen in JAX: video diffusion transformers with sparse attention.",
    epilog="Exit codes: 0 done; 1 values that are not finite; 2 wrong usage or bad input; 3 the "
    "system refuses (disk, rights, memory, another run, a missing package); 4 a folder is not what "
    "was converted; 70 internal error; 130 Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Given = Mapping[str, Any]  # what was given of a group of options


for command in CHECKPOINT_COMMANDS:
    app.command()(command)


@app.command()
@with_options(model=MODEL, sparsity=SPARSITY, warmup=WARMUP, given=parameters_of(*KINDS))
def generate(
    model: Given,
    output: Annotated[
        Path,
        _option(
            "--output",
            "-o",
            help="The file to write: .mp4, .gif or .png, or .npz for the latents. With --prompts a "
            "folder, or a pattern such as out/{index:03d}.gif; the first index is 0.",
        ),
    ],
    prompts: Annotated[
        Path | None,
        _option(
            "--prompts",
            help="A file of prompts, one a line, in place of --prompt. Blank lines and # comments "
            "are skipped; so are videos that an earlier call made.",
        ),
    ] = None,
    attention: Annotated[
        Attention, _option("--attention", help="Dense attention, or Sparse VideoGen.")
    ] = Attention.svg,
    labels_out: Annotated[
        Path | None,
        _option(
            "--labels-out", help="Write labels, errors and densities of all sparse steps: .npz."
        ),
    ] = None,
    *,
    sparsity: Given,
    warmup: Given,
    given: Given,
) -> None:
    """Generate a video from a prompt, or one from each line of a file.

    A run that was stopped, by Ctrl-C or otherwise, goes on with the same command and --resume.

    Example: svg-jax generate --model tiny --prompt "a pink two circling over the cat" -o two.gif
    """
    from svg_jax.cli import videos
    from svg_jax.cli.given import ModelChoice

    videos.generate(
        ModelChoice(**model),
        output,
        given,
        sparsity=sparsity if attention is Attention.svg else None,
        warmup=_warmup(warmup),
        prompts=prompts,
        labels_out=labels_out,
    )


@app.command()
@with_options(
    model=MODEL,
    sparsity=SPARSITY,
    warmup=WARMUP,
    given=parameters_of(*KINDS, where=lambda name, setting: setting.panel != SAVING),
)
def compare(
    model: Given,
    output: Annotated[
        Path,
        _option("--output", "-o", help="Name of the videos to write, OUTPUT.mp4 and OUTPUT.gif."),
    ] = Path("compare"),
    pattern: Annotated[
        PatternName,
        _option("--pattern", help="Profile heads (svg), take all for one kind, or draw kinds."),
    ] = PatternName.svg,
    json_file: Annotated[
        Path | None, _option("--json", help="Write the figures to this file, too.")
    ] = None,
    *,
    sparsity: Given,
    warmup: Given,
    given: Given,
) -> None:
    """Generate a video with dense and with sparse attention, and compare the two.

    Example: svg-jax compare --model tiny --prompt "a blue five standing still over the stars"
    """
    from svg_jax.cli import videos
    from svg_jax.cli.given import ModelChoice

    videos.compare(
        ModelChoice(**model),
        output,
        given,
        sparsity=sparsity,
        warmup=_warmup(warmup),
        pattern=pattern.value,
        json_file=json_file,
    )


@app.command()
@with_options(
    given=parameters_of(
        RunSettings, where=lambda name, setting: name in ("num_inference_steps", "seed")
    )
)
def demo(
    prompt: Annotated[
        str,
        _option(
            "--prompt",
            help="Text of what the video shows; an error lists the few words that the model knows.",
        ),
    ] = "a red three moving left over the flower",
    density: Density = None,
    output: Annotated[
        Path,
        _option("--output", "-o", help="Name of the videos to write, OUTPUT.mp4 and OUTPUT.gif."),
    ] = Path("demo"),
    source: Annotated[
        Path | None,
        _option(
            "--source", help="Folder in diffusers' layout to use in place of the bundled model."
        ),
    ] = None,
    *,
    given: Given,
) -> None:
    """Compare dense and sparse attention on the bundled model, which is called tiny.

    Example: svg-jax demo --density 0.2 --steps 30
    """
    from svg_jax.cli import videos

    videos.demo({"prompt": prompt, **given}, density=density, output=output, source=source)


def _warmup(given: Given) -> dict[str, Any]:
    """Name the fields of a Warmup that were given, as --dense-steps gives its steps."""
    return {name.removeprefix("dense_"): value for name, value in given.items()}


def _print_version(wanted: bool) -> bool:
    """Print the version if it is wanted, and end the command line."""
    if wanted:
        say(f"svg-jax {svg_jax.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        _option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, _option("--debug", help="Print the traceback of an error; anywhere in a command.")
    ] = False,
) -> None:
    """Take the options that stand before a command; `main` has read --debug."""
    del version, debug


def main() -> None:
    """Run the command line; an error is one sentence and an exit code (see `errors.py`)."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with forgiving_streams():
        code = _run(arguments, debug=len(arguments) < len(sys.argv) - 1)
    if code == ExitCode.INTERRUPTED:
        # The temporary files are gone. A step may still be running on other threads, and Python's
        # own way out would take its memory away and crash.
        os._exit(code)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    """Run a command, and give its exit code."""
    warnings.showwarning = _show_warning
    logger = logging.getLogger("svg_jax")
    logger.handlers, logger.propagate = [_Echo()], False  # else absl's handler says it again
    logger.setLevel(logging.INFO)
    # Orbax logs there the tracebacks of its threads; what went wrong is raised as well.
    logging.getLogger("absl").disabled = not debug
    command = typer.main.get_command(app)
    try:
        with ended_by_signals(), command.make_context("svg-jax", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:  # after --help or --version
        return end.exit_code
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            tell_lines(traceback.format_exception(error))
        failure = failure_of(error, _options_of(command, arguments))
        if failure.sentence:
            tell(failure.sentence)
        return failure.code
    return 0


def _options_of(group: Any, arguments: list[str]) -> dict[str, str]:
    """Collect the options of the called command by the names of what they give."""
    command = next((group.commands[name] for name in arguments if name in group.commands), group)
    options = [given for given in command.params if given.param_type_name == "option"]
    flags = {option.name: option.opts[0] for option in options}
    return flags | {name: flag for name, flag in OF_WARMUP.items() if flag in flags.values()}


class _Echo(logging.Handler):
    """Tell what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    del filename, lineno, file, line
    if issubclass(category, UserWarning):
        tell(str(message))

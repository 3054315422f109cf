"""The commands for checkpoints: `svg-jax convert | export | verify | inspect`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from svg_jax.cli.options import Given, JsonFile, argument, parameter, with_options
from svg_jax.sampling.settings.fields import OUTPUT

_WRITING = "Destination"
_of_source = partial(parameter, panel="Source")
_of_lora = partial(parameter, panel="LoRA")
_of_destination = partial(parameter, panel=_WRITING)
_OVERWRITE = _of_destination("overwrite", bool, "Replace the checkpoint at the destination.")
_VARIANT = _of_source("variant", str, "Variant of the weights where there are several, e.g. fp16.")
_WEIGHTS_KEY = _of_source(
    "weights_key", str, "Key of the weights to take where a file holds several, e.g. ema."
)
_CONVERSION = (
    argument(
        "source",
        str,
        "Pipeline to convert: a folder in diffusers' layout or Wan-AI's, or a hub id; or one "
        "component's folder, or a file of weights.",
    ),
    argument("destination", Path, "Folder to create."),
    _of_source(
        "components",
        str,
        "Names of the components to convert, e.g. transformer,text_encoder; default: all.",
    ),
    _VARIANT,
    _WEIGHTS_KEY,
    _of_source("revision", str, "Branch, tag or commit of a hub id; default: main."),
    _of_lora(
        "lora",
        list[str],
        "LoRA to merge (file, folder or hub id, see docs/lora.md); may be repeated.",
    ),
    _of_lora(
        "lora_scale", list[float], "Strength of the LoRAs, one for all or one for each; default: 1."
    ),
    _of_lora(
        "lora_into",
        list[str],
        "Transformer that the LoRAs are for, one for all or one for each; default: transformer. "
        "Wan 2.2 also has transformer_2.",
    ),
    _of_lora("strict", bool, "Refuse a LoRA with parts for layers that the model lacks."),
    _of_destination(
        "dtype",
        Literal["float32", "bfloat16", "float16"],
        "Dtype to cast weights to, except those that the model keeps in float32; default: no cast.",
        option="--cast",
    ),
    _of_destination("allow_nonfinite", bool, "Accept NaN and infinities, and count them."),
    _OVERWRITE,
)


@with_options(given=_CONVERSION)
def convert(
    given: Given,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be written, and write nothing.",
            rich_help_panel=_WRITING,
        ),
    ] = False,
) -> None:  # fmt: skip
    """Convert a trained checkpoint; the same command resumes a conversion that was stopped.

    Example: svg-jax convert Wan2.1-T2V-14B wan --lora style.safetensors --lora-scale 0.8
    """
    from svg_jax.cli import checkpoints

    checkpoints.convert(given, dry_run=dry_run)


@with_options(given=(_OVERWRITE,))
def export(
    source: Annotated[Path, typer.Argument(help="Converted folder.")],
    destination: Annotated[Path, typer.Argument(help="Folder to create.")],
    *,
    given: Given,
) -> None:
    """Write a converted checkpoint back in diffusers' layout, bit for bit.

    Example: svg-jax export wan wan-diffusers
    """
    from svg_jax.cli import checkpoints

    checkpoints.export(source, destination, **given)


def verify(folder: Annotated[Path, typer.Argument(help="Converted folder.")]) -> None:
    """Read a whole converted checkpoint, and compare every bit with its manifest.

    Example: svg-jax verify wan
    """
    from svg_jax.cli import checkpoints

    checkpoints.verify(folder)


@with_options(reading=(_VARIANT, _WEIGHTS_KEY))
def inspect(
    source: Annotated[
        Path, typer.Argument(help="Converted folder, or a folder or file that convert takes.")
    ],
    *,
    reading: Given,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Read every tensor for its min, max, mean, std and non-finite count.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Show what a checkpoint holds: components, configs, parameters, dtypes, merged LoRAs.

    Example: svg-jax inspect wan
    """
    from svg_jax.cli import checkpoints

    checkpoints.inspect_source(source, statistics=stats, json_file=json_file, **reading)


CHECKPOINT_COMMANDS = (convert, export, verify, inspect)

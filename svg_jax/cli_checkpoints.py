"""The commands for checkpoints: `svg-jax convert | export | verify | inspect`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class StoredDtype(StrEnum):
    """What weights are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Weights to take where there are several, e.g. fp16."),
]

WeightsKey = Annotated[
    str | None,
    typer.Option(
        "--weights-key",
        help="Weights to take where a file holds several, by the key before them, e.g. ema.",
    ),
]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A pipeline's folder in diffusers' layout or Wan-AI's, or its hub id; a "
            "component's folder; or a file of weights."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to make.")],
    components: Annotated[
        str | None,
        typer.Option("--components", help="Only these, e.g. transformer,text_encoder."),
    ] = None,
    dtype: Annotated[
        StoredDtype | None,
        typer.Option(
            "--dtype",
            help="Cast weights, but those that the model keeps in float32; default: as they are.",
        ),
    ] = None,
    variant: Variant = None,
    weights_key: WeightsKey = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of a hub id: a branch, tag or commit.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            help="A LoRA to merge (file, folder or hub id, see docs/lora.md); may be repeated.",
        ),
    ] = None,
    lora_scale: Annotated[
        list[float] | None,
        typer.Option("--lora-scale", help="Its strength: one for all, or one each; default: 1."),
    ] = None,
    lora_into: Annotated[
        list[str] | None,
        typer.Option(
            "--lora-into",
            help="Which transformer it is for: one for all, or one each; default: transformer.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse a LoRA with parts for layers that the model lacks."),
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Take NaN and infinities, and count them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the destination.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
) -> None:
    """Convert a trained checkpoint; the same command again takes up one that was killed."""
    from svg_jax import commands_checkpoints

    names = None if components is None else [name.strip() for name in components.split(",")]
    commands_checkpoints.convert(
        source,
        destination,
        revision=revision,
        components=names,
        dtype=dtype,
        variant=variant,
        weights_key=weights_key,
        lora=lora or (),
        lora_scale=lora_scale or (1.0,),
        lora_into=lora_into or ("transformer",),
        strict=strict,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        dry_run=dry_run,
    )


def export(
    source: Annotated[Path, typer.Argument(help="A converted folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Write a converted checkpoint back in diffusers' layout, bit for bit."""
    from svg_jax import commands_checkpoints

    commands_checkpoints.export(source, destination)


def verify(
    folder: Annotated[Path, typer.Argument(help="A converted folder.")],
) -> None:
    """Read a converted checkpoint whole and compare every bit with its manifest."""
    from svg_jax import commands_checkpoints

    commands_checkpoints.verify(folder)


def inspect(
    source: Annotated[
        Path, typer.Argument(help="A converted folder, or a source's folder or file.")
    ],
    stats: Annotated[
        bool, typer.Option("--stats", help="Read every tensor: min, max, mean, std, not finite.")
    ] = False,
    variant: Variant = None,
    weights_key: WeightsKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint holds: components, configs, parameters, dtypes."""
    from svg_jax import commands_checkpoints

    commands_checkpoints.inspect_source(
        source, statistics=stats, variant=variant, weights_key=weights_key, as_json=as_json
    )


CHECKPOINT_COMMANDS = (convert, export, verify, inspect)

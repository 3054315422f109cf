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
    typer.Option("--variant", help="Which weights to take where a folder has several, e.g. fp16."),
]

WeightsKey = Annotated[
    str | None,
    typer.Option(
        "--weights-key",
        help="Which weights to take where a file holds several, by the key before them, e.g. ema.",
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        help="A pipeline's folder in diffusers' layout or Wan-AI's, or its hub id; a "
        "component's folder; or a file of weights."
    ),
]
Destination = Annotated[Path, typer.Argument(help="The folder to make.")]
Components = Annotated[
    str | None,
    typer.Option(
        "--components",
        help="Names of the components to convert, e.g. transformer,text_encoder; default: all.",
    ),
]
Dtype = Annotated[
    StoredDtype | None,
    typer.Option(
        "--dtype",
        help="Cast the weights, but those that the model keeps in float32; default: no cast.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id; default: main."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="LoRA to merge (file, folder or hub id, see docs/lora.md); may be repeated.",
    ),
]
LoraScales = Annotated[
    list[float] | None,
    typer.Option(
        "--lora-scale", help="Strength of the LoRAs, one for all or one for each; default: 1."
    ),
]
LoraTargets = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-into",
        help="Transformer that the LoRAs are for, one for all or one for each; default: "
        "transformer. Wan 2.2 has transformer_2, too.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse a LoRA with parts for layers that the model lacks."),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option("--allow-nonfinite", help="Convert NaN and infinities, too, and count them."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a checkpoint that stands at the destination."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
]


def convert(
    source: Source,
    destination: Destination,
    components: Components = None,
    dtype: Dtype = None,
    variant: Variant = None,
    weights_key: WeightsKey = None,
    revision: Revision = None,
    lora: Loras = None,
    lora_scale: LoraScales = None,
    lora_into: LoraTargets = None,
    strict: Strict = False,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Convert a trained checkpoint; the same command again takes up one that was killed.

    Example: svg-jax convert Wan2.1-T2V-14B wan --lora style.safetensors --lora-scale 0.8
    """
    from svg_jax.cli import checkpoints
    from svg_jax.convert.settings import ConversionSettings, list_loras

    names = None if components is None else [name.strip() for name in components.split(",")]
    settings = ConversionSettings(
        source=source,
        destination=destination,
        revision=revision,
        components=names,
        dtype=dtype,
        variant=variant,
        weights_key=weights_key,
        loras=list_loras(lora, lora_scale or 1.0, lora_into or "transformer"),
        strict=strict,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
    )
    checkpoints.convert(settings, dry_run=dry_run)


def export(
    source: Annotated[Path, typer.Argument(help="A converted folder.")],
    destination: Destination,
) -> None:
    """Write a converted checkpoint back in diffusers' layout, bit for bit.

    Example: svg-jax export wan wan-diffusers
    """
    from svg_jax.cli import checkpoints

    checkpoints.export(source, destination)


def verify(
    folder: Annotated[Path, typer.Argument(help="A converted folder.")],
) -> None:
    """Read a converted checkpoint whole, and compare every bit with its manifest.

    Example: svg-jax verify wan
    """
    from svg_jax.cli import checkpoints

    checkpoints.verify(folder)


def inspect(
    source: Annotated[
        Path, typer.Argument(help="A converted folder, or what convert takes: a folder or file.")
    ],
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Read every tensor for its min, max, mean, std and non-finite count."
        ),
    ] = False,
    variant: Variant = None,
    weights_key: WeightsKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Say what a checkpoint holds: components, configs, parameters, dtypes, merged LoRAs.

    Example: svg-jax inspect wan
    """
    from svg_jax.cli import checkpoints

    checkpoints.inspect_source(
        source, statistics=stats, variant=variant, weights_key=weights_key, as_json=as_json
    )


CHECKPOINT_COMMANDS = (convert, export, verify, inspect)

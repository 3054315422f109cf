"""What the commands for checkpoints do."""

import json
from collections.abc import Sequence
from pathlib import Path

from svg_jax.bundled import bundled_or
from svg_jax.cli.console import bytes_bar, check_printed, print_parts, say
from svg_jax.cli.tables import contents_tables, contents_values, plan_tables
from svg_jax.convert import (
    convert_pipeline,
    export_pipeline,
    plan_conversion,
    read_contents,
    verify_pipeline,
)
from svg_jax.convert.checkpoint.staging import check_destination, describe
from svg_jax.convert.sources.hub import download_components, download_index, is_hub_id


def convert(
    source: str,
    destination: Path,
    *,
    revision: str | None = None,
    components: Sequence[str] | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    weights_key: str | None = None,
    lora: Sequence[str] = (),
    lora_scale: Sequence[float] = (1.0,),
    lora_into: Sequence[str] = ("transformer",),
    strict: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Convert a pipeline or a component, or say what that would give."""
    folder = _here(source, revision=revision, components=components, variant=variant)
    if dry_run:
        plan = plan_conversion(
            folder,
            components=components,
            dtype=dtype,
            variant=variant,
            weights_key=weights_key,
            lora=lora,
            lora_scale=lora_scale,
            lora_into=lora_into,
            strict=strict,
        )
        for path in plan.sources:
            check_destination(destination, path, plan.written_nbytes, overwrite)
        print_parts(*plan_tables(plan))
        if overwrite and destination.exists():
            say(f"would delete {describe(destination)}")
        check_printed()
        return
    with bytes_bar() as progress:
        convert_pipeline(
            folder,
            destination,
            components=components,
            dtype=dtype,
            variant=variant,
            weights_key=weights_key,
            lora=lora,
            lora_scale=lora_scale,
            lora_into=lora_into,
            strict=strict,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            progress=progress,
        )
    say(f"wrote {destination}")


def _here(
    source: str, *, revision: str | None, components: Sequence[str] | None, variant: str | None
) -> Path:
    """Find what is there by that name, or bring what the hub has into its cache."""
    source = str(bundled_or(source))
    path = Path(source).expanduser()
    if path.exists() or not is_hub_id(source):
        if revision is not None:
            raise ValueError(f"{source}: --revision goes with a hub id alone")
        return path
    folder = download_index(source, revision=revision)
    download_components(source, folder, components=components, variant=variant)
    return folder


def export(source: Path, destination: Path) -> None:
    """Write a converted folder back in diffusers' layout, with a progress bar."""
    with bytes_bar() as progress:
        export_pipeline(Path(bundled_or(source)), destination, progress=progress)
    say(f"wrote {destination}")


def verify(folder: Path) -> None:
    """Compare a converted folder with its manifest, with a progress bar."""
    with bytes_bar() as progress:
        manifest = verify_pipeline(Path(bundled_or(folder)), progress=progress)
    tensors = sum(map(len, manifest.components.values()))
    files = len(manifest.files) + len(manifest.weights)
    say(f"{folder} is as it was converted: {tensors} tensors in {files} files")


def inspect_source(
    source: Path,
    *,
    statistics: bool,
    variant: str | None,
    weights_key: str | None,
    as_json: bool,
) -> None:
    """Print what a folder or file holds."""
    source = Path(bundled_or(source))
    with bytes_bar() as progress:
        contents = read_contents(
            source,
            statistics=statistics,
            variant=variant,
            weights_key=weights_key,
            progress=progress,
        )
    if as_json:
        print(json.dumps(contents_values(contents), indent=1))
    else:
        print_parts(*contents_tables(contents))
    check_printed()

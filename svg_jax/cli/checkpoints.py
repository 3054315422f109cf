"""What the commands for checkpoints do."""

import json
from dataclasses import replace
from pathlib import Path

from svg_jax.bundled import bundled_or
from svg_jax.cli.console import bytes_bar, check_printed, print_parts, say
from svg_jax.cli.tables import contents_tables, contents_values, plan_tables
from svg_jax.convert import (
    ConversionSettings,
    export_pipeline,
    make_plan,
    read_contents,
    verify_pipeline,
    write_plan,
)
from svg_jax.convert.checkpoint.staging import describe
from svg_jax.convert.sources.hub import fetch_source


def convert(settings: ConversionSettings, *, dry_run: bool) -> None:
    """Convert a pipeline or a component, or say what that would give."""
    plan = make_plan(fetch_source(replace(settings, source=bundled_or(settings.source))))
    destination = Path(settings.destination or "")
    if dry_run:
        print_parts(*plan_tables(plan))
        if settings.overwrite and destination.exists():
            say(f"would delete {describe(destination)}")
        check_printed()
        return
    with bytes_bar() as progress:
        write_plan(plan, progress)
    say(f"wrote {destination}")


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

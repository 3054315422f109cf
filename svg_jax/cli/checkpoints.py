"""Work of the commands for checkpoints."""

from pathlib import Path
from typing import Any

from svg_jax.bundled import bundled_or
from svg_jax.cli.console import bytes_bar, check_printed, print_parts, say
from svg_jax.cli.options import Given
from svg_jax.cli.outputs import STANDARD_OUTPUT, check_outputs, json_report
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
from svg_jax.convert.settings import list_loras
from svg_jax.convert.sources.hub import fetch_source


def convert(given: Given, *, dry_run: bool) -> None:
    """Convert a pipeline or a component, or print the plan alone."""
    settings = _settings_of(given)
    plan = make_plan(fetch_source(settings))
    destination = Path(given["destination"])
    if dry_run:
        print_parts(*plan_tables(plan))
        if settings.overwrite and destination.exists():
            say(f"would delete {describe(destination)}")
        check_printed()
        return
    with bytes_bar() as progress:
        write_plan(plan, progress)
    say(f"wrote {destination}")


def _settings_of(given: Given) -> ConversionSettings:
    """Make the settings of a conversion from the options that were given."""
    settings: dict[str, Any] = {**given, "source": bundled_or(given["source"])}
    if "components" in given:
        settings["components"] = [name.strip() for name in given["components"].split(",")]
    names = "lora", "lora_scale", "lora_into"
    lists = {name: settings.pop(name) for name in names if settings.get(name) is not None}
    return ConversionSettings(**settings, loras=list_loras(lists.pop("lora", None), **lists))


def export(source: Path, destination: Path, *, overwrite: bool = False) -> None:
    """Write a converted folder back in diffusers' layout, under a progress bar."""
    with bytes_bar() as progress:
        folder = Path(bundled_or(source))
        export_pipeline(folder, destination, overwrite=overwrite, progress=progress)
    say(f"wrote {destination}")


def verify(folder: Path) -> None:
    """Compare a converted folder with its manifest, under a progress bar."""
    with bytes_bar() as progress:
        manifest = verify_pipeline(Path(bundled_or(folder)), progress=progress)
    tensors = sum(map(len, manifest.components.values()))
    files = len(manifest.files) + len(manifest.weights)
    say(f"{folder} is as it was converted: {tensors} tensors in {files} files")


def inspect_source(
    source: Path,
    *,
    statistics: bool,
    json_file: Path | None = None,
    variant: str | None = None,
    weights_key: str | None = None,
) -> None:
    """Print the contents of a folder or file as tables, or as JSON; or write the JSON, too."""
    source = Path(bundled_or(source))
    if json_file is not None:
        check_outputs([("--json", json_file)], {"source": source})
    with bytes_bar() as progress:
        contents = read_contents(
            source,
            statistics=statistics,
            variant=variant,
            weights_key=weights_key,
            progress=progress,
        )
    if json_file is not None:
        with json_report(json_file) as write:
            write(contents_values(contents))
    if json_file != STANDARD_OUTPUT:
        print_parts(*contents_tables(contents))
    check_printed()

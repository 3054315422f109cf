"""Tables of a checkpoint's contents, of a planned conversion and of a comparison."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table

from svg_jax.cli.console import add_row, printable
from svg_jax.convert.contents import ComponentContents, Contents
from svg_jax.convert.formats.show import show_some
from svg_jax.convert.plan import ConversionPlan
from svg_jax.stages import Stopwatch

if TYPE_CHECKING:  # checkpoints are shown without sampling, which takes a while to import
    from svg_jax.evaluation.report import ComparisonReport

_NAMED = 8  # names printed of a long list


def contents_tables(contents: Contents) -> Iterator[Table | str]:
    """Tabulate components, configs and, if they were measured, tensors."""
    what = contents.pipeline or "a component alone"
    yield f"{what}, {'' if contents.converted else 'not '}converted"
    table = _table("component", "class", "parameters", "size", "dtypes")
    for part in contents.components:
        row = (
            part.name,
            part.class_name,
            f"{part.parameters:,}",
            decimal(part.nbytes, precision=2),
        )
        add_row(table, *row, ", ".join(_shares(part)))
    for name, class_name in contents.others.items():
        add_row(table, name, class_name)
    for name in contents.skipped:
        add_row(table, name, "left out")
    yield table
    for part in contents.components:
        if part.release is not None:
            yield f"{part.name}: {part.release} as released; by the names of {part.class_name}"
        for dtype, converted in part.casts.items():
            yield f"{part.name}: {dtype} is converted to {converted}"
        for what, names in (
            ("tensors that the model does not need", part.unused),
            ("keys of config.json without effect", part.passed_over),
        ):
            if names:
                yield f"{part.name}: {len(names)} {what}: {show_some(names, _NAMED)}"
    for lora in contents.loras:
        digests = ", ".join(f"{name} sha256 {sha256}" for name, sha256 in lora.files.items())
        yield f"merged: {lora.source} at {lora.scale:g} into {lora.into} ({digests})"
        if lora.skipped:
            yield f"not merged, since the model lacks it: {', '.join(lora.skipped)}"
    for part in contents.components:
        values = ", ".join(f"{key}={value!r}" for key, value in part.config.items())
        yield f"{part.name}: {values}"
    for part in contents.components:
        if any(tensor.statistics for tensor in part.tensors):
            yield _tensors_table(part)


def _tensors_table(part: ComponentContents) -> Table:
    table = _table(part.name, "shape", "dtype", "min", "max", "mean", "std", "not finite")
    for tensor in part.tensors:
        found = tensor.statistics
        assert found is not None
        figures = (found.minimum, found.maximum, found.mean, found.std)
        add_row(
            table,
            tensor.name,
            "×".join(map(str, tensor.shape)),
            tensor.dtype,
            *("–" if figure is None else f"{figure:.4g}" for figure in figures),
            str(found.nonfinite),
        )
    return table


def contents_values(contents: Contents) -> dict[str, Any]:
    """Collect a checkpoint's contents as values for JSON."""
    values = dataclasses.asdict(contents)
    for part, component in zip(values["components"], contents.components, strict=True):
        part |= {
            "parameters": component.parameters,
            "bytes": component.nbytes,
            "dtypes": component.dtypes,
        }
    return values


def plan_tables(plan: ConversionPlan) -> Iterator[Table | str]:
    """Tabulate the components and files that a conversion would write."""
    table = _table("component", "class", "tensors", "read", "written", "dtypes", "not needed")
    for part in plan.components:
        dtypes = sorted({leaf.dtype.name for leaf in part.files.values()})
        add_row(
            table,
            part.name,
            part.class_name,
            str(len(part.tensors)),
            decimal(part.nbytes, precision=2),
            decimal(part.stored_nbytes, precision=2),
            " and ".join(dtypes),
            f"{len(part.unused)}: {show_some(part.unused)}" if part.unused else "",
        )
    yield table
    for lora in plan.loras:
        changed = sum(map(len, lora.changes.values()))
        size = decimal(sum(file.stat().st_size for file in lora.states), precision=2)
        where = " and ".join(sorted(lora.changes))
        scale = lora.source.scale
        yield f"merges {lora.path} ({size}) at {scale:g} into {changed} tensors of {where}"
        if lora.skipped:
            yield f"not merged, since the model lacks it: {', '.join(lora.skipped)}"
    if plan.skipped:
        yield f"left out: {', '.join(plan.skipped)}"
    yield (
        f"would write {plan.written_nbytes:,} bytes: these weights, {len(plan.files)} small files "
        "as they are, and a manifest"
    )


def comparison_table(report: "ComparisonReport") -> Table:
    """Tabulate the figures of a comparison."""
    title = printable(f"{report.prompt} (seed {report.seed})")
    meaning = "PSNR and SSIM compare with the dense video of the same noise, not with a true one."
    table = Table(title=title, show_header=False, caption=None if report.psnr is None else meaning)
    table.add_column(style="bold")
    table.add_column()
    for row in _rows_of(report):
        add_row(table, *row)
    return table


def stages_table(watch: Stopwatch) -> Table:
    """Tabulate where the time of a command went and, if the device tells, its memory."""
    memory = ["peak device memory"] if watch.peak_bytes else []
    table = _table("where the time went", "seconds", *memory)
    for name, seconds in watch.seconds.items():
        peak = watch.peak_bytes.get(name)
        add_row(table, name, f"{seconds:.2f}", *([f"{peak / 2**30:.2f} GiB"] if peak else []))
    add_row(table, "total", f"{watch.total:.2f}")
    return table


def stages_values(watch: Stopwatch) -> dict[str, Any]:
    """Collect where the time and memory of a command went as values for JSON."""
    return {
        "stage_seconds": dict(watch.seconds),
        "total_seconds": watch.total,
        "stage_peak_bytes": dict(watch.peak_bytes),
    }


def _rows_of(report: "ComparisonReport") -> list[tuple[str, str]]:
    size = f"{' x '.join(map(str, report.latents))}: {report.num_tokens:,} tokens"
    steps = f"{report.num_inference_steps}, the first {report.dense_steps} dense in both"
    if report.guided_steps:
        steps += f", the first {report.guided_steps} guided"
    rows = [("latents", size), ("steps", steps)]
    if report.density is not None:
        asked = report.requested_density
        asked = "" if asked is None else f" ({asked:g} asked)"
        rows.append(("density", f"{report.density:.3f} of dense attention{asked}"))
    if report.psnr is not None:
        rows.append(("PSNR to dense", f"{report.psnr:.2f} dB"))
    if report.ssim is not None:
        rows.append(("SSIM to dense", f"{report.ssim:.4f}"))
    shares = ", ".join(f"{share:.0%}" for share in report.spatial_share)
    return [
        *rows,
        ("dense step", f"{report.dense_seconds:.2f} s"),
        ("sparse step", f"{report.sparse_seconds:.2f} s, {report.speed_up:.2f} times faster"),
        ("spatial heads", f"{shares or 'not known'} (by layer; pattern: {report.pattern})"),
        ("attention", f"{report.implementation} in {report.dtype}"),
        ("device", report.device),
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _shares(part: ComponentContents) -> Iterator[str]:
    for dtype, size in part.dtypes.items():
        share = "" if len(part.dtypes) == 1 else f" {size / part.parameters:.1%}"
        yield f"{dtype}{share}"

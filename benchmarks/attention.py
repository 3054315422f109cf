"""Sparse against dense attention on an NVIDIA GPU at the sizes of real video models, bfloat16.

    python benchmarks/attention.py --torch --json benchmarks/results/attention.json
    python benchmarks/plot_attention.py benchmarks/results/attention.json

Every figure is a median of rounds in which all rows of a case run in turns, cuDNN's dense attention
among them; a ratio is between timings of the same round. What takes less than a tenth of the dense
row's time is queued behind a dense call, whose time is taken off, as work in a model is queued:
alone it would be the host that is timed, which launches small programs slower than they run.

Sections:

* cases: the kernels, profiling, the layout, and whole steps of Sparse VideoGen. A whole step runs
  the profiling but has every second head temporal: random data would make none or all of them so.
* portable: the same attention by the kernel that needs no particular device.
* density: the kernel at six densities, and the line through its times.
* length: the kernel from 18,000 to 248,400 tokens.
* torch (only if asked for): PyTorch's dense attention, and FlexAttention on the same masks.

A JSON file keeps what other runs wrote, so that sections can be measured one by one. `--tiny` tries
everything on small shapes, on a CPU too; its figures mean nothing. `--check` ends with 1 where a
case's kernel is slower than its `least_rate`, or its whole step than its target.
"""

import argparse
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import (
    CASES,
    DENSE,
    KERNEL,
    STEP,
    Case,
    Run,
    case_functions,
    dense_call,
    kept_blocks,
    kernel_call,
    pad_to_eights,
    random_arrays,
    relative_rate,
)
from measured import provenance_of
from timing import Seconds, runnable, spread, time_row, write_entry

from svg_jax import SparsityConfig, VideoLayout
from svg_jax.masks import realised_density, sparse_mask

RATE, STEP_IS_FAST = "kernel's rate to cuDNN's", "meets it"
PORTABLE, PORTABLE_CASE, PORTABLE_ROUNDS = "portable kernel", "Wan 480p", 5
DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
DENSITY_CASES = ("Wan 720p", "CogVideoX-1.5")
# Frames of 3,600 tokens, and heads. The first series gives the device's multiprocessors as much
# work at every length; two heads of 18,000 tokens are too little to share it evenly.
LENGTHS = {
    "as much work at every length": ((5, 28), (9, 15), (19, 7), (37, 4), (69, 2)),
    "two heads": ((5, 2), (9, 2), (19, 2), (37, 2), (69, 2)),
}
LENGTH_CONFIG = SparsityConfig(density=0.25, first_frame_sink=False)
Entry = dict[str, Any]


def new_entry(
    run: Run,
    case: Case,
    seconds: Seconds,
    failures: dict[str, str],
    baseline: str | None = DENSE,
) -> Entry:
    """Collect what was measured and how, and its times."""
    rows = {name: time_row(seconds, name, baseline) for name in seconds if name != "copy"}
    return {
        "measured": provenance_of("benchmarks/attention.py"),
        "rounds": len(seconds[DENSE]),
        "kernel": run.implementation,
        "head_dim": case.head_dim,
        "rows": rows,
        **({"failed": failures} if failures else {}),
    }


def shape_of(case: Case) -> Entry:
    """Sizes of a case, and how much of it is computed."""
    mask = sparse_mask(case.layout, case.config)
    return {
        "tokens": mask.num_tokens,
        "heads": case.heads,
        "density": case.config.density,
        "density kept": round(float(realised_density(mask)), 4),
        "blocks kept": kept_blocks(mask, case.heads),
    }


def shortfall(name: str, entry: Entry) -> str | None:
    """Say in what a case is slower than it has to be; None if in nothing.

    Args:
        name: The case's name in `CASES`.
        entry: What was measured of it.
    """
    least, rate = CASES[name].least_rate, entry.get(RATE, 0.0)
    if rate < least:
        return f"{name}: the sparse kernel has {rate} of cuDNN's rate, and should have {least}"
    if not entry.get(STEP_IS_FAST, True):
        return f"{name}: the whole step takes more than {CASES[name].target} of dense attention"
    return None


def case_entries(run: Run, name: str) -> dict[str, Entry]:
    """Time all rows of a case, with what they are to be compared with."""
    case = run.fit(CASES[name])
    functions, failures = runnable(case_functions(run, case))
    seconds = run.measure(functions)
    mask = sparse_mask(case.layout, case.config)
    entry = new_entry(run, case, seconds, failures)
    entry |= {"layout": dataclasses.asdict(case.layout), **shape_of(case)}
    copy_rate = run.copy_bytes / np.array(seconds["copy"])
    flops = 4 * case.heads * case.head_dim * mask.num_tokens**2
    entry["copy, GB/s read and written"] = spread(1e-9 * copy_rate, 0)[1]
    entry["TFLOP/s, dense"] = spread(1e-12 * flops / np.array(seconds[DENSE]), 1)[1]
    if KERNEL in seconds:
        rate = relative_rate(seconds, KERNEL, mask, case.heads)
        entry["TFLOP/s, kernel"] = round(rate * entry["TFLOP/s, dense"], 1)
        entry[RATE] = rate
    array_bytes = 2 * mask.num_tokens * case.heads * case.head_dim
    for row, passes, what in (
        ("profile", 2, "profile to one read of K and V"),
        ("layout", 8, "layout to one read and write of Q, K, V and O"),
    ):
        if row in seconds:
            entry[what] = spread(np.array(seconds[row]) * copy_rate / (passes * array_bytes))[1]
    if case.target is not None and STEP in seconds:
        entry["target of the whole step"] = case.target
        entry[STEP_IS_FAST] = entry["rows"][STEP]["to dense"] <= case.target
    return {f"{name}, {case.heads} heads": entry}


def portable_entries(run: Run, name: str) -> dict[str, Entry]:
    """Time the portable kernel on the same GPU, and compare the kernels' outputs."""
    case = run.fit(CASES[name])
    mask = sparse_mask(case.layout, case.config)
    arrays = random_arrays(case.shape)[:3]
    functions, failures = runnable(
        {
            DENSE: dense_call(run, *arrays),
            KERNEL: kernel_call(run, mask, *pad_to_eights(*arrays)),
            PORTABLE: kernel_call(run, mask, *arrays, implementation="xla"),
        }
    )
    seconds = run.measure(functions, PORTABLE_ROUNDS)
    entry = new_entry(run, case, seconds, failures) | shape_of(case)
    if not failures:
        tokens = slice(mask.num_tokens)
        ours, theirs = (
            functions[kernel]()[:, tokens].astype(jnp.float32) for kernel in (KERNEL, PORTABLE)
        )
        entry["largest difference of the kernels"] = float(jnp.abs(ours - theirs).max())
        entry["largest output"] = float(jnp.abs(theirs).max())
    return {f"{name}, {case.heads} heads": entry}


def density_entries(run: Run, name: str) -> dict[str, Entry]:
    """Time the kernel by density, and fit a line by least squares."""
    case = run.fit(CASES[name])
    arrays = random_arrays(case.shape)[:3]
    swept = {}
    for density in DENSITIES:
        config = dataclasses.replace(case.config, density=density)
        swept[f"density {density:g}"] = dataclasses.replace(case, config=config)
    masks = {row: sparse_mask(each.layout, each.config) for row, each in swept.items()}
    functions = {DENSE: dense_call(run, *arrays)}
    arrays = pad_to_eights(*arrays)
    functions |= {row: kernel_call(run, mask, *arrays) for row, mask in masks.items()}
    functions, failures = runnable(functions)
    seconds = run.measure(functions)
    entry = new_entry(run, case, seconds, failures)
    points = [
        shape_of(swept[row])
        | {"rate to cuDNN's": relative_rate(seconds, row, masks[row], case.heads)}
        | time_row(seconds, row, DENSE)
        for row in swept
        if row in seconds
    ]
    entry["points"] = points
    entry["kernel's rates to cuDNN's"] = [point["rate to cuDNN's"] for point in points]
    entry |= fitted_line([p["blocks kept"] for p in points], [p["ms"] for p in points])
    return {f"{name}, {case.heads} heads": entry}


def fitted_line(blocks: list[float], milliseconds: list[float]) -> Entry:
    """Least squares of time against blocks."""
    x, y = np.array(blocks), np.array(milliseconds)
    slope, start = np.polyfit(x, y, 1)
    unexplained = np.square(y - slope * x - start).sum() / np.square(y - y.mean()).sum()
    return {
        "line, ns a block": round(1e6 * float(slope), 3),
        "line, ms at no block": round(float(start), 4),
        "line, R2": round(1 - float(unexplained), 5),
        "target of R2": 0.99,
    }


def length_entries(run: Run, _: str) -> dict[str, Entry]:
    """Time the kernel a block by length, for each series of heads; all lengths take turns."""
    cases = {
        (frames, heads): run.fit(Case(VideoLayout(frames, 3600), LENGTH_CONFIG, heads, heads))
        for series in LENGTHS.values()
        for frames, heads in series
    }
    functions: dict[str, Callable[[], Any]] = {}
    for (frames, heads), case in cases.items():
        arrays = random_arrays(case.shape)[:3]
        mask = sparse_mask(case.layout, case.config)
        functions[f"{frames} frames, {heads} heads"] = kernel_call(run, mask, *arrays)
        if (frames, heads) == (37, 2):
            functions[DENSE] = dense_call(run, *arrays)
    functions, failures = runnable(functions)
    seconds = run.measure(functions)
    entries = {}
    for series, shapes in LENGTHS.items():
        named = {
            f"{frames} frames, {heads} heads": cases[frames, heads] for frames, heads in shapes
        }
        points = []
        for row in [row for row in named if row in seconds]:
            point = shape_of(named[row]) | time_row(seconds, row)
            point["ns a block"] = round(1e6 * point["ms"] / point["blocks kept"], 3)
            points.append(point)
        chosen = {row: times for row, times in seconds.items() if row in (DENSE, *named)}
        entry = new_entry(run, cases[shapes[0]], chosen, failures, baseline=None)
        entry["points"] = points
        entry["tokens"] = [point["tokens"] for point in points]
        entry["ns a block"] = each = [point["ns a block"] for point in points]
        entry["slowest to fastest block"] = round(max(each) / min(each), 4)
        entry["target of this ratio"] = 1.08
        entries[series] = entry
    return entries


def torch_entries(run: Run, name: str) -> dict[str, Entry]:
    """PyTorch's kernels on a case, beside cuDNN's dense attention from JAX."""
    from attention_torch import torch_functions, torch_versions, wait

    case = run.fit(CASES[name])
    mask = sparse_mask(case.layout, case.config)
    functions = {DENSE: dense_call(run, *random_arrays(case.shape)[:3])}
    functions |= torch_functions(mask, case.heads, case.head_dim)
    functions, failures = runnable(functions, wait)
    seconds = run.measure(functions, wait=wait)
    entry = new_entry(run, case, seconds, failures) | shape_of(case)
    entry["measured"]["versions"] |= torch_versions()
    for row in seconds:
        if "Flex" in row:
            entry["FlexAttention's rate to cuDNN's"] = relative_rate(seconds, row, mask, case.heads)
    return {f"{name}, {case.heads} heads": entry}


SECTIONS: dict[str, tuple[Callable[[Run, str], dict[str, Entry]], tuple[str, ...]]] = {
    "cases": (case_entries, tuple(CASES)),
    "portable": (portable_entries, (PORTABLE_CASE,)),
    "density": (density_entries, DENSITY_CASES),
    "length": (length_entries, ("all lengths",)),
    "torch": (torch_entries, tuple(CASES)),
}


def print_entry(section: str, name: str, entry: Entry) -> None:
    """One line a row, then the figures that stand beside the rows."""
    print(f"\n{section}: {name}")
    for what, row in entry["rows"].items():
        low, high = row["quartiles"]
        ratio = f"   {row['to dense']:.4f} of dense" if "to dense" in row else ""
        print(f"  {what:22} {row['ms']:9.3f} ms   ({low:.3f} to {high:.3f}){ratio}")
    for what, figure in entry.items():
        if what not in ("measured", "rows", "points"):
            print(f"  {what}: {figure}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print and write; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cases,portable,density,length"
    parser.add_argument("--sections", default=default, help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--torch", action="store_true", help="the section torch, too")
    parser.add_argument("--cases", default="", help="parts of names of the cases to keep")
    parser.add_argument("--heads", choices=("some", "all"), default="some", help="of the models'")
    parser.add_argument("--implementation", default="mosaic_gpu", help="the sparse kernel")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file to put the figures into")
    parser.add_argument("--tiny", action="store_true", help="dry run on small shapes, any device")
    parser.add_argument("--check", action="store_true", help="fail where a case is too slow")
    args = parser.parse_args(arguments)
    sections = [*args.sections.split(","), *(["torch"] if args.torch else [])]
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if not args.tiny and jax.default_backend() != "gpu":
        parser.error(f"needs an NVIDIA GPU, not {jax.default_backend()}: --tiny is the dry run")
    if args.check and (args.tiny or "cases" not in sections):
        parser.error("--check is for the section cases at its own sizes: pass no --tiny")
    run = Run(
        implementation="xla" if args.tiny else args.implementation,
        dense="xla" if args.tiny else "cudnn",
        rounds=3 if args.tiny else args.rounds,
        tiny=args.tiny,
        all_heads=args.heads == "all",
    )
    kept = args.cases.split(",")
    started, failed, too_slow = time.perf_counter(), False, []
    for section in dict.fromkeys(sections):
        measure, names = SECTIONS[section]
        for name in names:
            if name in CASES and not any(part.lower() in name.lower() for part in kept):
                continue
            print(f"\n[{time.perf_counter() - started:.0f} s] {section}: {name}", flush=True)
            try:
                entries = measure(run, name)
            except Exception:  # the other entries are worth having
                traceback.print_exc()
                failed = True
                continue
            for title, entry in entries.items():
                print_entry(section, title, entry)
                write_entry(args.json, section, title, entry)
                failed |= "failed" in entry
                if args.check and section == "cases":
                    too_slow += filter(None, [shortfall(name, entry)])
    print(f"\n[{time.perf_counter() - started:.0f} s] done")
    print("\n".join(too_slow), file=sys.stderr)
    return int(failed or bool(too_slow))


if __name__ == "__main__":
    sys.exit(main())

"""Draws what `attention.py` measured, and prints it as a Markdown table for the README.

    python benchmarks/plot_attention.py benchmarks/results/attention.json

Left: a whole step of Sparse VideoGen against dense attention. Its bar is made of the times of its
parts, measured alone; the black line is the time of the whole. Right: the kernel's time against the
share of 128×128 blocks that it computes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot

DENSE, KERNEL, STEP = "cuDNN dense", "sparse kernel", "whole step"
PARTS = {KERNEL: "#2a6f97", "profile": "#f4a259", "layout": "#8cb369"}
GREY, COLOURS = "#b8b8b8", ("#2a6f97", "#bc4b51", "#6a4c93", "#5b8e7d")
FLEX, RATE = "torch FlexAttention", "kernel's rate to cuDNN's"
Entries = dict[str, dict[str, Any]]


def draw_cases(axes: Any, cases: Entries) -> None:
    """Draw a bar of dense attention and one of a whole step for each case."""
    width = 0.38
    for place, entry in enumerate(cases.values()):
        rows = entry["rows"]
        first = place == 0
        dense, step = rows[DENSE]["ms"], rows[STEP]["ms"]
        axes.bar(place - width / 2, dense, width, color=GREY, label=DENSE if first else None)
        bottom = 0.0
        for part, colour in PARTS.items():
            label = part if first else None
            height = rows[part]["ms"]
            axes.bar(place + width / 2, height, width, bottom, color=colour, label=label)
            bottom += height
        line = [place, place + width]
        axes.plot(line, [step, step], color="black", lw=1.5, label=STEP if first else None)
        axes.annotate(
            f"{dense / step:.2f}×",
            (place + width / 2, max(step, bottom)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
        )
    names = [
        f"{name.split(',')[0]}\n{entry['tokens']:,} tokens\n{entry['heads']} × {entry['head_dim']}"
        for name, entry in cases.items()
    ]
    axes.set_xticks(range(len(cases)), names, fontsize=8)
    axes.set_ylabel("ms")
    axes.set_title("One layer's attention, and how many times faster it gets", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def draw_density(axes: Any, sweeps: Entries) -> None:
    """Points of each sweep over densities, and the fitted lines."""
    for colour, (name, entry) in zip(COLOURS, sweeps.items(), strict=False):
        points = entry["points"]
        blocks = np.array([point["blocks kept"] for point in points])
        share = 100 * blocks / (points[0]["heads"] * (-(-points[0]["tokens"] // 128)) ** 2)
        label = f"{name}: R² = {entry['line, R2']:.4f}"
        axes.plot(share, [point["ms"] for point in points], "o", color=colour, ms=5, label=label)
        line = np.array([0, blocks.max()])
        fitted = entry["line, ms at no block"] + 1e-6 * entry["line, ns a block"] * line
        axes.plot(line / blocks.max() * share.max(), fitted, color=colour, lw=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("blocks kept, %")
    axes.set_ylabel("ms")
    axes.set_title("The kernel alone, by density", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def draw(document: dict[str, Entries], path: Path) -> None:
    """Draw the figure of both."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(1.5, 1), layout="constrained"
    )
    draw_cases(left, document["cases"])
    draw_density(right, document.get("density", {}))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(provenance_line(document["cases"]), fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def provenance_line(entries: Entries) -> str:
    """Device, versions and dates of entries."""
    measured = [entry["measured"] for entry in entries.values()]
    devices = sorted({each["device"] for each in measured})
    versions = sorted({each["versions"]["jax"] for each in measured})
    dates = sorted({each["date"] for each in measured})
    return f"{', '.join(devices)}; jax {', '.join(versions)}; {', '.join(dates)}; bfloat16"


def table(document: dict[str, Entries]) -> str:
    """Cases as rows of Markdown: milliseconds, and what they are relative to."""
    lines = [
        "| case | tokens, heads | dense, ms | whole step, ms | of dense | target | kernel, ms "
        "| rate to cuDNN's | profile, ms (reads of K, V) | layout, ms (passes) "
        "| FlexAttention, of dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in document["cases"].items():
        rows = entry["rows"]
        flex = document.get("torch", {}).get(name, {}).get("rows", {}).get(FLEX)
        target = entry.get("target of the whole step")
        profile, layout = (
            entry["profile to one read of K and V"],
            entry["layout to one read and write of Q, K, V and O"],
        )
        cells = [
            name.split(",")[0],
            f"{entry['tokens']:,}, {entry['heads']} × {entry['head_dim']}",
            f"{rows[DENSE]['ms']:.2f}",
            f"**{rows[STEP]['ms']:.2f}**",
            f"{rows[STEP]['to dense']:.3f}",
            "" if target is None else f"≤ {target:.3f}",
            f"{rows[KERNEL]['ms']:.2f}",
            f"{entry[RATE]:.2f}",
            f"{rows['profile']['ms']:.2f} ({profile:.2f}×)",
            f"{rows['layout']['ms']:.2f} ({layout:.2f}×)",
            "" if flex is None else f"{flex['to dense']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", provenance_line(document["cases"])]
    for name, entry in document.get("density", {}).items():
        rates = ", ".join(f"{rate:.2f}" for rate in entry["kernel's rates to cuDNN's"])
        lines.append(f"Density, {name}: R² {entry['line, R2']:.4f}; rates to cuDNN's {rates}.")
    for name, entry in document.get("length", {}).items():
        each = ", ".join(f"{value:.1f}" for value in entry["ns a block"])
        ratio = entry["slowest to fastest block"]
        lines.append(f"Length, {name}: {each} ns a block; slowest to fastest {ratio:.3f}.")
    return "\n".join(lines)


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="what attention.py wrote")
    parser.add_argument("--image", type=Path, default=Path("docs/images/attention.png"))
    args = parser.parse_args()
    document = json.loads(args.json.read_text())
    draw(document, args.image)
    print(table(document))


if __name__ == "__main__":
    main()

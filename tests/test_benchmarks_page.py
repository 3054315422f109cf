"""Figures of docs/benchmarks.md are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


RESULTS = {
    name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    for name in ("attention", "forward")
}
ATTENTION = {
    "Wan 720p, density .30": "Wan 720p, 8 heads",
    "Wan 480p, density .30": "Wan 480p, 12 heads",
    "HunyuanVideo 720p, density .25": "HunyuanVideo 720p, 6 heads",
    "CogVideoX-1.5, density .25": "CogVideoX-1.5, 12 heads",
}
FORWARD = {
    "HunyuanVideo, 720p, 129 frames": "HunyuanVideo 720p, 129 frames",
    "Wan 2.1 14B, 720p, 81 frames": "Wan 14B 720p, 81 frames",
    "CogVideoX-1.5, 768 × 1360, 81 frames": "CogVideoX-1.5 768x1360, 81 frames",
    "Wan 2.1 1.3B, 480p, 81 frames": "Wan 1.3B 480p, 81 frames",
}


def numbers(section: str, row: str) -> list[float]:
    """Numbers of a row of a table of docs/benchmarks.md, its first two cells left out."""
    part = (ROOT / "docs/benchmarks.md").read_text().partition(f"## {section}\n")[2]
    (cells,) = re.findall(
        rf"^\| {re.escape(row)} \|[^|]*\|(.*)\|$", part.partition("\n## ")[0], re.MULTILINE
    )
    return [float(found) for found in re.findall(r"\d*\.\d+", cells)]


@pytest.mark.parametrize("row", ATTENTION)
def test_figures_of_attention_are_the_committed_ones(row):
    case = RESULTS["attention"]["cases"][ATTENTION[row]]
    rows = case["rows"]
    dense, step, share, _, kernel, rate, profile, layout = numbers("Attention of one layer", row)
    for name, shown in (
        ("cuDNN dense", dense),
        ("whole step", step),
        ("sparse kernel", kernel),
        ("profile", profile),
        ("layout", layout),
    ):
        assert shown == pytest.approx(rows[name]["ms"], abs=0.0051)
    assert share == pytest.approx(rows["whole step"]["to dense"], abs=0.00051)
    assert rate == pytest.approx(case["kernel's rate to cuDNN's"], abs=0.0051)


@pytest.mark.parametrize("row", FORWARD)
def test_figures_of_forwards_are_the_committed_ones(row):
    case = RESULTS["forward"]["forward"][FORWARD[row]]
    dense, sparse, share, density, memory = numbers("Forwards of whole transformers", row)
    rows = case["rows"]
    assert dense == pytest.approx(rows["dense"]["ms"] / 1000, abs=0.0051)
    assert sparse == pytest.approx(rows["sparse"]["ms"] / 1000, abs=0.0051)
    assert share == pytest.approx(rows["sparse"]["to dense"], abs=0.00051)
    assert density == pytest.approx(rows["sparse"]["density"], abs=0.00051)
    assert memory == pytest.approx(case["GiB, in use at most"], abs=0.051)

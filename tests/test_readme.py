"""What the README shows runs as it stands."""

import json
import re
import sys
from pathlib import Path

import pytest
import typer

import svg_jax
from svg_jax.cli.app import app

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import project_runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def marked(mark: str) -> list[str]:
    """Lines of the block that `.ci/run` finds by a mark."""
    (block,) = re.findall(
        rf"^<!-- ci: {mark} -->\n```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE
    )
    return block.splitlines()


def test_two_blocks_are_those_that_ci_runs():
    assert marked("demo") == ["pip install '.[video]'", "svg-jax demo"]
    assert marked("test")[-1] == "pytest"


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {svg_jax.__version__}\n" in citation
    assert "2502.01776" in citation
    assert "2502.01776" in README.partition("```bibtex")[2]


def test_each_option_says_what_it_gives():
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for name, command in commands.items():
        assert f"Example: svg-jax {name}" in command.help
        for parameter in command.params:
            help = parameter.help or ""
            assert help.endswith("."), (name, parameter.name)
            assert not help.startswith(("Of ", "Default", "In ", "Its ")), (name, parameter.name)


def test_the_architecture_names_files_that_exist():
    rows = (ROOT / "docs/architecture.md").read_text().partition("## Decisions")[0].splitlines()
    named = []
    for row in rows:
        folder = Path()
        for path in map(Path, re.findall(r"`([^`… ]+\.py)`", row)):
            folder = path.parent if len(path.parts) > 1 else folder
            named.append(folder / path.name)
            assert list(ROOT.glob(str(folder / path.name))), row
    assert len(named) > 100


def test_it_is_short():
    prose = re.sub(
        r"^```.*?^```$|^\|[^\n]*$|<!--.*?-->", "", README, flags=re.DOTALL | re.MULTILINE
    )
    assert 300 < len(prose.split()) <= 1000


def row(first: str) -> list[str]:
    """Cells behind the first of a table's row that begins with it."""
    (cells,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", README, flags=re.MULTILINE)
    return [cell.strip() for cell in cells.split("|")]


@pytest.mark.parametrize(
    ("model", "run", "case", "hub_name"),
    [
        (
            "CogVideoX 1.5-5b",
            "CogVideoX 1.5, 768 × 1360, 81 frames",
            "CogVideoX-1.5, 12 heads",
            "CogVideoX1.5-5B",
        ),
        (
            "HunyuanVideo",
            "HunyuanVideo, 720p, 129 frames",
            "HunyuanVideo 720p, 6 heads",
            "HunyuanVideo",
        ),
        (
            "Wan 2.1 14B",
            "Wan 2.1 14B, 720p, 81 frames",
            "Wan 720p, 8 heads",
            "Wan2.1-T2V-14B-Diffusers",
        ),
        ("Wan 2.1 1.3B", "Wan 2.1 1.3B, 480p, 81 frames", None, "Wan2.1-T2V-1.3B-Diffusers"),
    ],
)
def test_its_figures_are_those_of_the_committed_results(model, run, case, hub_name):
    projected = project_runs.rounded(project_runs.RUNS[run])
    minutes, dense, memory, _ = projected
    assert row(model)[-2:] == [str(minutes), str(memory)]
    table = (ROOT / "docs/running.md").read_text()
    assert re.search(rf"--model \S*{hub_name} [^|]*\| {minutes} \| {memory} \|", table)
    if case is None:  # the first real video
        assert f"takes about {minutes} minutes" in README
        return
    results = ROOT / "benchmarks/results"
    attention = json.loads((results / "attention.json").read_text())["cases"][case]["rows"]
    forward = json.loads((results / "forward.json").read_text())["forward"]
    step = forward[project_runs.RUNS[run].forward]["rows"]["sparse"]
    assert row(run) == [
        f"{1 / attention['whole step']['to dense']:.1f} × faster",
        f"{1 / step['to dense']:.1f} × faster",
        f"{minutes} minutes instead of {dense}",
    ]


def test_the_projections_are_those_that_the_command_prints():
    assert project_runs.table() in (ROOT / "docs/benchmarks.md").read_text()

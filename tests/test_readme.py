"""What the README shows runs as it stands."""

import re
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
import typer

import svg_jax
from svg_jax.cli.app import app
from svg_jax.cli.errors import ExitCode

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^(?: {4})?(svg-jax .+)$", README, flags=re.MULTILINE)
COMMANDS += re.findall(r"`(svg-jax [^`…]+)`", README)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run_where_nothing_was_done_before(number, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SVG_JAX_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[number].replace("num_inference_steps=20", "num_inference_steps=4")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {})
    assert ("save_video" in block) == (tmp_path / "three.mp4").exists()


@pytest.mark.parametrize("line", [line for line in COMMANDS if len(shlex.split(line)) > 2])
def test_commands_are_ones_that_the_command_line_takes(line):
    group: Any = typer.main.get_command(app)
    name, *rest = shlex.split(line)[1:]
    # Files and folders that are not there are found out later: here options are.
    context = group.get_command(typer.Context(group), name).make_context(name, rest)
    assert context.params


def test_the_first_two_shell_blocks_are_those_that_ci_runs():
    first, second = re.findall(r"^```sh\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)[:2]
    assert first.splitlines() == ["pip install '.[video]'", "svg-jax demo"]
    assert second.splitlines()[-1] == "pytest"


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {svg_jax.__version__}\n" in citation
    assert "2502.01776" in citation
    assert "2502.01776" in README.partition("```bibtex")[2]


def test_exit_codes_that_are_told_are_those_that_there_are():
    codes = {0, *map(int, ExitCode)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)} == codes
    assert {int(code) for code in re.findall(r"\b\d+\b", app.info.epilog or "")} == codes


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


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_links_lead_somewhere(page):
    file = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)", file.read_text())
    assert links
    for link in links:
        if not link.startswith("http"):
            assert (file.parent / link).exists(), link

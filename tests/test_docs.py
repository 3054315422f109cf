"""What the README and the pages show runs as it stands, on the bundled model made small."""

import os
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
import typer

import svg_jax
from svg_jax.cli.app import app
from svg_jax.cli.errors import ExitCode

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/**/*.md")))]
FENCE = re.compile(r"(?:^<!-- ci: (\w+) -->\n)?^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Fences that run, and those whose commands are parsed alone: they need a GPU, or the hub.
RUN, PARSED, SHOWN = ("python", "sh"), ("sh gpu", "sh hub"), ("text", "bibtex", "")
SMALL = ("--num-frames", "2", "--steps", "2")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        mark: What `.ci/run` knows it by, or "": it runs such a block itself.
        fence: The words after the fence.
        text: Its lines.
    """

    mark: str
    fence: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Commands of a block of the shell, as words."""
        return [shlex.split(line, comments=True) for line in self.text.splitlines() if line]


def blocks_of(page: str) -> list[Block]:
    return [Block(mark or "", *rest) for mark, *rest in FENCE.findall((ROOT / page).read_text())]


RUNNING = [page for page in PAGES if any(block.fence in RUN for block in blocks_of(page))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("docs")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_blocks_run_in_their_order(page, cache, run, monkeypatch, capsys):
    monkeypatch.setenv("SVG_JAX_CACHE", str(cache))
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.fence == "python":
            small = re.sub(
                r"num_inference_steps=\d+", r"num_inference_steps=2, num_frames=2", block.text
            )
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                exec(compile(small, page, "exec"), names)
        elif block.fence == "sh" and not block.mark:
            for program, *words in block.commands:
                if program == "python":
                    monkeypatch.setattr(sys, "argv", words)
                    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
                    continue
                assert program == "svg-jax", page
                result = run(*words, *(SMALL if words[0] in ("generate", "compare") else ()))
                assert result.code == 0, (words, result.err)


@pytest.mark.parametrize("page", PAGES)
def test_fences_are_of_known_kinds(page):
    for block in blocks_of(page):
        assert block.fence in (*RUN, *PARSED, *SHOWN), block.text
        assert block.mark in ("", "demo", "test")


SHELL = [
    (page, words)
    for page in PAGES
    for block in blocks_of(page)
    if block.fence.startswith("sh")
    for words in block.commands
]
INLINE = [
    (page, shlex.split(line))
    for page in PAGES
    for line in re.findall(r"`(svg-jax\s[^`…]+)`", (ROOT / page).read_text())
]


GROUP: Any = typer.main.get_command(app)
COMMANDS = GROUP.commands


def parse(words: list[str]) -> typer.Context:
    """Parse a command as the command line does, short of running it."""
    name, *rest = words[1:]
    command = GROUP.get_command(typer.Context(GROUP), name)
    # A mention of an option leaves out what a command needs beside it.
    needed = [given for given in command.params if given.param_type_name == "argument"]
    if not rest or rest[0].startswith("-"):
        rest = [*("x" for _ in needed), *rest]
    # Files and folders that are not there are found out later: here options are.
    return command.make_context(name, rest)


@pytest.mark.parametrize(("page", "words"), [*SHELL, *INLINE])
def test_commands_are_ones_that_there_are(page, words):
    program, *rest = words
    match program:
        case "svg-jax" if len(rest) == 1:
            assert rest[0] in COMMANDS or rest[0] in {
                option for given in GROUP.params for option in given.opts
            }
        case "svg-jax":
            assert parse(words).params
        case "python":
            script = (ROOT / rest[0]).read_text()
            for option in (word for word in rest if word.startswith("--")):
                assert f'"{option}"' in script, f"{rest[0]} has no {option}"
        case "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = re.search(r"\[(.+)\]", rest[-1])
            assert extras is not None
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
        case _:
            assert words == ["pytest"]


def test_options_that_there_are_not_would_be_noticed():
    for words in (["verify", "wan", "--no-such-option"], ["convert", "--cast", "int3"]):
        with pytest.raises(Exception, match=r"--no-such-option|int3"):
            parse(["svg-jax", *words])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", (ROOT / page).read_text())):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link


def test_exit_codes_that_are_told_are_those_that_there_are():
    page = (ROOT / "docs/running.md").read_text().partition("## Exit codes")[2]
    codes = {0, *map(int, ExitCode)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)} == codes
    assert {int(code) for code in re.findall(r"\b\d+\b", app.info.epilog or "")} == codes


def test_the_reference_and_help_have_every_public_name():
    pages = "".join(page.read_text() for page in ROOT.glob("docs/api/*.md"))
    told = set(re.findall(r"^::: svg_jax\.(\w+)$", pages, flags=re.MULTILINE))
    assert told == set(svg_jax.__all__) - {"__version__"}
    help_text = pydoc.plain(pydoc.render_doc(svg_jax))
    assert {name for name in told if not re.search(rf"\b{name}\b", help_text)} == set()


def test_the_site_builds_without_warnings(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)]
    ran = subprocess.run(
        build,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "api/attention/index.html").stat().st_size > 10_000


def test_arguments_are_described_by_nouns():
    """Ruff's D401 has functions begin with a verb; nothing has arguments begin with a subject."""
    pattern = re.compile(r"^ +\*{0,2}\w+: (?:Of |Likewise|As `).*$", re.MULTILINE)
    files = [
        path
        for folder in ("svg_jax", "models", "kernels", "convert", "benchmarks", "examples", "docs")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 150
    assert {path: lines for path in files if (lines := pattern.findall(path.read_text()))} == {}
    assert pattern.search("    Args:\n        dtype: Of matrix products.\n")

"""What the help shows, and what a shell completes."""

import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from svg_jax import cli
from svg_jax.cli.app import app

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {"": GROUP, **GROUP.commands}


def example_of(command: Any) -> list[str]:
    (example,) = [line for line in command.help.splitlines() if line.startswith("Example: ")]
    program, *words = shlex.split(example.removeprefix("Example: "))
    assert program == "svg-jax"
    return words


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_has_an_example_that_the_command_line_takes(name):
    first, *words = example_of(COMMANDS[name])
    assert first == (name or "demo")
    assert GROUP.commands[first].make_context(first, words).params
    assert "Example: svg-jax" in CliRunner().invoke(app, [name, "--help"] if name else []).output


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_option_stands_in_a_group(name):
    command = GROUP.commands[name]
    options = [each for each in command.params if each.param_type_name == "option"]
    assert all(each.rich_help_panel for each in options if each.name != "help")
    assert command.rich_help_panel in ("Videos", "Checkpoints")


def test_a_flag_means_the_same_in_every_command():
    meanings: dict[str, set[str]] = {}
    for command in GROUP.commands.values():
        for option in command.params:
            if option.param_type_name == "option":
                meanings.setdefault(option.opts[0], set()).add(option.help)
    several = {flag for flag, helps in meanings.items() if len(helps) > 1}
    # A file or a name, and a text of the bundled model's words: the same thing, of narrower choice.
    assert several == {"--output", "--prompt"}


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("svg-jax gen", ["generate"]),
        ("svg-jax generate --num-v", ["--num-videos"]),
        ("svg-jax compare --scheduler u", ["unipc"]),
        ("svg-jax export --over", ["--overwrite"]),
    ],
)
def test_a_shell_completes(words, completed, monkeypatch, capsys):
    monkeypatch.setenv("_SVG_JAX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert capsys.readouterr().out.split() == completed

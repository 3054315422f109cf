"""Options as parameters of commands, in groups that commands share."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from svg_jax.sampling.settings.fields import OUTPUT

Command = Callable[..., None]
Given = Mapping[str, Any]  # values of the options of a group that were given
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="File to write the figures to as JSON; - writes to standard output, and nothing else "
        "is printed there.",
        rich_help_panel=OUTPUT,
    ),
]


def parameter(
    name: str, kind: Any, help: str, *, panel: str, option: str | None = None, required=False
) -> inspect.Parameter:
    """Make the parameter of a command that takes the value of an option.

    Args:
        name: Name of the parameter.
        kind: Type of the value.
        help: Description of the option.
        panel: Group of options that the help shows it in.
        option: Names of the option: "--output -o", or "--on/--off" for a switch. Default: the
            parameter's, with dashes.
        required: Whether the option must be given. Otherwise the parameter defaults to None, or to
            False for a switch that has no second name.
    """
    option = option or "--" + name.replace("_", "-")
    info = typer.Option(*option.split(), help=help, rich_help_panel=panel, show_default=False)
    if required:
        return _parameter(name, kind, info, inspect.Parameter.empty)
    is_switch = kind is bool and "/" not in option
    return _parameter(name, kind if is_switch else kind | None, info, False if is_switch else None)


def argument(name: str, kind: Any, help: str) -> inspect.Parameter:
    """Make the parameter of a command that takes a positional argument."""
    return _parameter(name, kind, typer.Argument(help=help), inspect.Parameter.empty)


def _parameter(name: str, kind: Any, info: Any, default: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, info])


def with_options(**groups: Sequence[inspect.Parameter]) -> Callable[[Command], Command]:
    """Give a command groups of options, each in place of the parameter of its name.

    Args:
        **groups: Parameters of each group.

    Returns:
        Decorator of a command, whose parameter of a group's name is the `Given` of the group.
    """
    taken = {made.name for group in groups.values() for made in group}

    def decorate(command: Command) -> Command:
        parameters = [
            made.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            for made in groups.get(name, (parameter,))
        ]

        @functools.wraps(command)
        def called(**arguments: Any) -> None:
            values = {name: _given_of(group, arguments) for name, group in groups.items()}
            own = {name: value for name, value in arguments.items() if name not in taken}
            command(**own, **values)

        vars(called)["__signature__"] = inspect.Signature(parameters)
        return called

    return decorate


def _given_of(group: Sequence[inspect.Parameter], arguments: Given) -> dict[str, Any]:
    values = ((made, arguments.get(made.name, made.default)) for made in group)
    return {made.name: value for made, value in values if value is not made.default}

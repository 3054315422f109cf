"""Options that are made of the settings' fields, and how what they give becomes settings again.

A field is an option by what it says of itself (`Setting`): name, help, group and type are in no
second place. Fields of all families are options of one command, for which model is asked is not
known before it is loaded: a model of another family refuses them then.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from svg_jax.cli.options import OF_WARMUP
from svg_jax.convert.formats.values import Choice, Flag, Number, Shares
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.hunyuan_video.settings import HunyuanVideoSettings
from svg_jax.sampling.settings import PlaybackSettings, Setting, settings_of
from svg_jax.sampling.settings.fields import defaults_of, help_of, is_file, option_of
from svg_jax.sampling.settings.rules import FilePath
from svg_jax.sampling.wan.settings import WanSettings

FAMILIES: tuple[type, ...] = (CogVideoXSettings, HunyuanVideoSettings, WanSettings)
KINDS: tuple[type, ...] = (*FAMILIES, PlaybackSettings)

Command = Callable[..., None]


def every_setting() -> dict[str, Setting]:
    """Collect what the fields of all families say, and those of how a video is shown."""
    return settings_of(*KINDS)


def flag_of(field: str) -> str:
    """Name the option that gives a field, as `--num-frames` gives `num_frames`."""
    if field in OF_WARMUP:
        return OF_WARMUP[field]
    setting = every_setting().get(field)
    option = None if setting is None else option_of(field, setting)
    return "--" + field.replace("_", "-") if option is None else option


def with_options(**groups: Sequence[inspect.Parameter]) -> Callable[[Command], Command]:
    """Give a command the options of some groups, each in place of a parameter of its name.

    Args:
        **groups: Parameters of each group.

    Returns:
        What decorates the command: a group's parameter is then what was given of its options.
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
            values = {name: given_of(group, arguments) for name, group in groups.items()}
            own = {name: value for name, value in arguments.items() if name not in taken}
            command(**own, **values)

        vars(called)["__signature__"] = inspect.Signature(parameters)
        return called

    return decorate


def parameters_of(
    *kinds: type, where: Callable[[str, Setting], bool] = lambda name, setting: True
) -> list[inspect.Parameter]:
    """Make the parameters of a command that give settings.

    Args:
        *kinds: Dataclasses of settings; a field that several have is one option.
        where: Tells by name and setting which of their fields are options of this command.
    """
    defaults = {name: default for kind in kinds for name, default in defaults_of(kind).items()}
    return [
        option_parameter(name, setting, defaults[name])
        for name, setting in settings_of(*kinds).items()
        if option_of(name, setting) is not None and where(name, setting)
    ]


def option_parameter(name: str, setting: Setting, default: Any) -> inspect.Parameter:
    """Make the parameter of a command that gives a field."""
    is_flag = isinstance(setting.rule, Flag)
    option = typer.Option(
        option_of(name, setting), help=help_of(setting, default), rich_help_panel=setting.panel,
        show_default=False,
    )  # fmt: skip
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_flag else None,
        annotation=Annotated[bool if is_flag else _type_of(name, setting) | None, option],
    )


def given_of(group: Sequence[inspect.Parameter], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the arguments of a group whose options were given."""
    values = ((made, arguments.get(made.name, made.default)) for made in group)
    return {
        made.name: str(value) if isinstance(value, StrEnum) else value
        for made, value in values
        if value is not made.default
    }


def _type_of(name: str, setting: Setting) -> Any:
    """Choose the type of an option by what the values of its field must be."""
    match setting.rule:
        case Number(whole=True):
            return int
        case Number():
            return float
        case Shares():
            return tuple[float, float]
        case Choice(names=names):
            return StrEnum(name, {each: each for each in names})
        case FilePath():
            return Path
    return Path if is_file(setting) else str

"""What a field of the settings says of itself: once, for the check, the help and the identity."""

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from svg_jax.convert.formats.values import Shares
from svg_jax.sampling.settings.diffusers_names import INSTEAD
from svg_jax.sampling.settings.rules import ArrayOf, Images, Rule

Effect = Literal["bits", "rounding", "none"]
Kind = TypeVar("Kind", bound=type)
_KEY = "setting"


class SettingError(ValueError):
    """A setting that no run can have.

    Attributes:
        field: Name of the setting, with which the message begins.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


class UnknownSettingError(SettingError, TypeError):
    """A setting that the model's family does not have.

    Attributes:
        field: Name of the setting, as it was given.
    """

    def __init__(self, field: str, known: Collection[str]) -> None:
        near = difflib.get_close_matches(field, list(known), n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        hint = f": {INSTEAD[field]}" if field in INSTEAD else hint
        ValueError.__init__(self, f"this model takes no {field}{hint}")
        self.field = field


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field says of itself beside its name, type and default.

    Attributes:
        rule: What its values must be.
        meaning: What it is, as a sentence without its full stop; for who passes it from Python and
            for who gives the option.
        unit: What its number counts; empty where the meaning says it.
        otherwise: What None stands for; empty where it is nothing.
        optional: Whether None may be given.
        panel: Group of options that it belongs to.
        effect: What another value changes of the latents: bits, their rounding alone, or none.
        option: Option that gives it; empty is its name with dashes, None is not on the command
            line.
    """

    rule: Rule
    meaning: str
    unit: str = ""
    otherwise: str = ""
    optional: bool
    panel: str
    effect: Effect
    option: str | None = ""


def setting(
    default: Any,
    rule: Rule,
    *,
    meaning: str,
    panel: str,
    effect: Effect,
    unit: str = "",
    otherwise: str = "",
    optional: bool | None = None,
    option: str | None = "",
) -> Any:
    """Make a field of a dataclass of settings.

    Args:
        default: The field's default.
        rule: See `Setting`.
        meaning: See `Setting`.
        panel: See `Setting`.
        effect: See `Setting`.
        unit: See `Setting`.
        otherwise: See `Setting`.
        optional: Whether None may be given. Default: whether it is the default.
        option: See `Setting`.
    """
    return dataclasses.field(
        default=default,
        metadata={
            _KEY: Setting(
                rule=rule,
                meaning=meaning,
                unit=unit,
                otherwise=otherwise,
                optional=default is None if optional is None else optional,
                panel=panel,
                effect=effect,
                option=option,
            )
        },
    )


def settings_of(*kinds: type) -> dict[str, Setting]:
    """Collect what the fields of some dataclasses of settings say, by their names."""
    return {
        field.name: field.metadata[_KEY] for kind in kinds for field in dataclasses.fields(kind)
    }


def defaults_of(kind: type) -> dict[str, Any]:
    """Collect the defaults of a dataclass of settings, by its fields."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def option_of(name: str, setting: Setting) -> str | None:
    """Name the option of a field, as `--num-frames` of `num_frames`; None if it has none."""
    return "--" + name.replace("_", "-") if setting.option == "" else setting.option


def help_of(setting: Setting, default: Any) -> str:
    """Say what a field is, in what unit, and what it is unless it is given."""
    text = setting.meaning + (f", in {setting.unit}" if setting.unit else "")
    if setting.otherwise:
        return f"{text}; default: {setting.otherwise}."
    if default is None or default is False or default == "":
        return f"{text}."
    shown = " ".join(map(str, default)) if isinstance(setting.rule, Shares) else default
    return f"{text}; default: {shown}."


def documented(kind: Kind) -> Kind:
    """Put what the fields say of themselves into the docstring of a dataclass of settings."""
    defaults, lines = defaults_of(kind), []
    for name, setting in settings_of(kind).items():
        axes = (
            f" Axes: {', '.join(setting.rule.axes)}." if isinstance(setting.rule, ArrayOf) else ""
        )
        lines.append(f"        {name}: {help_of(setting, defaults[name])}{axes}")
    kind.__doc__ = f"{kind.__doc__}\n\n    Attributes:\n" + "\n".join(lines)
    return kind


def is_file(setting: Setting) -> bool:
    """Tell whether the option of a field is the path of a file that is read for its value."""
    return isinstance(setting.rule, ArrayOf | Images)

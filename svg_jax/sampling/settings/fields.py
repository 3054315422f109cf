"""What a field of the settings states about itself, for the check, the help and the identity."""

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from svg_jax.convert.formats.values import Shares
from svg_jax.sampling.settings.diffusers_names import INSIDE_A_VALUE, INSTEAD
from svg_jax.sampling.settings.rules import ArrayOf, Images, Rule

Effect = Literal["bits", "rounding", "none"]
Kind = TypeVar("Kind", bound=type)
_KEY = "setting"
PROMPT, VIDEO, SAMPLING, ATTENTION = "Prompt", "Video", "Sampling", "Attention"
OUTPUT, SAVING = "Output", "Saved runs"


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
        meant = f"did you mean {near[0]}?" if near else ""
        hint = INSTEAD.get(field) or INSIDE_A_VALUE.get(field) or meant
        ValueError.__init__(self, f"this model takes no {field}{hint and ': '}{hint}")
        self.field = field


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field states about itself beside its name, type and default.

    Attributes:
        rule: Rule that its values must meet.
        meaning: Meaning of the field, as a sentence without full stop, for Python and for the
            command line.
        unit: Unit of its number; empty where the meaning states it.
        otherwise: Value that None stands for; empty where there is none.
        optional: Whether None may be given.
        panel: Group of options that it belongs to.
        effect: Effect of another value on the latents: other bits, other rounding alone, or none.
        option: Option on the command line; empty is the field's name with dashes, None is none.
    """

    rule: Rule
    meaning: str
    unit: str = ""
    otherwise: str = ""
    optional: bool
    panel: str
    effect: Effect
    option: str | None = ""


def setting(default: Any, rule: Rule, *, optional: bool | None = None, **told: Any) -> Any:
    """Make a field of a dataclass of settings.

    Args:
        default: Default of the field.
        rule: See `Setting`.
        optional: Whether None may be given. Default: whether it is the default.
        **told: Other attributes of `Setting`.
    """
    optional = default is None if optional is None else optional
    made = Setting(rule=rule, optional=optional, **told)
    return dataclasses.field(default=default, metadata={_KEY: made})


# Functions that make the fields of a group; a field may state another effect.
of_prompt = partial(setting, panel=PROMPT, effect="bits")
of_video = partial(setting, panel=VIDEO, effect="bits")
of_sampling = partial(setting, panel=SAMPLING, effect="bits")
of_attention = partial(setting, panel=ATTENTION, effect="bits")
of_output = partial(setting, panel=OUTPUT, effect="none")
of_saving = partial(setting, panel=SAVING, effect="none")


def settings_of(*kinds: type) -> dict[str, Setting]:
    """Collect the `Setting` of each field of some dataclasses of settings."""
    return {
        field.name: field.metadata[_KEY] for kind in kinds for field in dataclasses.fields(kind)
    }


def defaults_of(kind: type) -> dict[str, Any]:
    """Collect the default of each field of a dataclass of settings."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def option_of(name: str, setting: Setting) -> str | None:
    """Name the option of a field, such as `--num-frames` for `num_frames`; None if it has none."""
    return "--" + name.replace("_", "-") if setting.option == "" else setting.option


def help_of(setting: Setting, default: Any) -> str:
    """Describe a field with its unit and default."""
    text = setting.meaning + (f", in {setting.unit}" if setting.unit else "")
    if setting.otherwise:
        return f"{text}; default: {setting.otherwise}."
    if default is None or default is False or default == "":
        return f"{text}."
    shown = " ".join(map(str, default)) if isinstance(setting.rule, Shares) else default
    return f"{text}; default: {shown}."


def documented(kind: Kind) -> Kind:
    """Add the descriptions of the fields to the docstring of a dataclass of settings."""
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

"""Options made from the fields of settings, whose names, types and descriptions stand there alone.

A command has the options of all families, since the model is not known before it is loaded; a
model refuses those of other families.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from svg_jax.cli.options import parameter
from svg_jax.config import SparsityConfig, Warmup
from svg_jax.convert.formats.values import Choice, Flag, Number, Shares
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.hunyuan_video.settings import HunyuanVideoSettings
from svg_jax.sampling.settings import PlaybackSettings, Setting, settings_of
from svg_jax.sampling.settings.fields import ATTENTION, defaults_of, help_of, is_file, option_of
from svg_jax.sampling.settings.rules import FilePath
from svg_jax.sampling.wan.settings import WanSettings

FAMILIES: tuple[type, ...] = (CogVideoXSettings, HunyuanVideoSettings, WanSettings)
KINDS: tuple[type, ...] = (*FAMILIES, PlaybackSettings)


def every_setting() -> dict[str, Setting]:
    """Collect the settings of all families, and those of playback."""
    return settings_of(*KINDS)


def flag_of(field: str) -> str:
    """Name the option of a field, as `--num-frames` of `num_frames`."""
    setting = every_setting().get(field)
    option = None if setting is None else option_of(field, setting)
    return option or OF_WARMUP.get(field, "--" + field.replace("_", "-"))


def parameters_of(
    *kinds: type, where: Callable[[str, Setting], bool] = lambda name, setting: True
) -> list[inspect.Parameter]:
    """Make the parameters of a command for settings.

    Args:
        *kinds: Dataclasses of settings; a field that several have is one option.
        where: Condition on the name and the setting of a field that becomes an option.
    """
    defaults = {name: default for kind in kinds for name, default in defaults_of(kind).items()}
    return [
        parameter(
            name,
            _type_of(setting),
            help_of(setting, defaults[name]),
            panel=setting.panel,
            option=option_of(name, setting),
        )
        for name, setting in settings_of(*kinds).items()
        if option_of(name, setting) is not None and where(name, setting)
    ]


def _type_of(setting: Setting) -> Any:
    """Choose the type of an option by its field's rule."""
    match setting.rule:
        case Flag():
            return bool
        case Number(whole=True):
            return int
        case Number():
            return float
        case Shares():
            return tuple[float, float]
        case Choice(names=names):
            return Literal[*names]
        case FilePath():
            return Path
    return Path if is_file(setting) else str


def _parameters_of_config(kind: type, prefix: str = "") -> tuple[inspect.Parameter, ...]:
    """Make the parameters of a command for the fields of a plain dataclass.

    Args:
        kind: The dataclass; its docstring describes the fields.
        prefix: Beginning of the parameters' names, before the fields'.
    """
    texts = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", kind.__doc__ or "", re.MULTILINE))
    made = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        text = " ".join(texts.get(field.name, "").split()).partition("; None")[0].removesuffix(".")
        option = "--" + name.replace("_", "-")
        (value_type, *_) = typing.get_args(field.type) or (field.type,)
        if value_type is bool:
            option += f"/--no-{option[2:]}"
        text += "; default: the model's."
        made.append(parameter(name, value_type, text, panel=ATTENTION, option=option))
    return tuple(made)


SPARSITY = _parameters_of_config(SparsityConfig)
WARMUP = _parameters_of_config(Warmup, "dense_")
# Options of the fields of a value in the settings.
OF_WARMUP = {"warmup.steps": "--dense-steps", "warmup.layers": "--dense-layers"}

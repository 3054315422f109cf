"""The settings of a run: what a value may be, what a field says of itself, and the value."""

from svg_jax.sampling.settings.checks import check_settings, count_prompts
from svg_jax.sampling.settings.fields import (
    Setting,
    SettingError,
    UnknownSettingError,
    setting,
    settings_of,
)
from svg_jax.sampling.settings.run import FlowSettings, PlaybackSettings, RunSettings, with_values

__all__ = [
    "FlowSettings",
    "PlaybackSettings",
    "RunSettings",
    "Setting",
    "SettingError",
    "UnknownSettingError",
    "check_settings",
    "count_prompts",
    "setting",
    "settings_of",
    "with_values",
]

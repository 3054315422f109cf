"""The identity of a run as JSON: its settings, weights, versions and device.

The effect that a field declares decides: another value of effect "bits" makes another run; of
effect "rounding" it makes the same run, rounded otherwise; "none" is left out.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image

from svg_jax.convert import Manifest
from svg_jax.convert.formats.digests import array_digest, bytes_digest
from svg_jax.provenance import run_environment
from svg_jax.sampling.settings import RunSettings, settings_of
from svg_jax.sampling.settings.fields import defaults_of

Fingerprint = Mapping[str, Any]

_SHOWN = 60  # characters of a setting in an error
_NAMED = 3  # settings that an error names
_ROUNDING = frozenset({"jax", "jaxlib", "device", "dtype"})  # beside fields of that effect
_LOGGER = logging.getLogger(__name__)


def identity_of(settings: RunSettings) -> dict[str, Any]:
    """Collect the settings that a run's latents depend on, without those at their defaults.

    A field that a later version adds thus changes no identity where it is not used.
    """
    defaults = defaults_of(type(settings))
    values = {name: getattr(settings, name) for name in defaults}
    return {
        name: values[name]
        for name, setting in settings_of(type(settings)).items()
        if setting.effect != "none" and not _is_default(values[name], defaults[name])
    }


def make_fingerprint(**told: Any) -> dict[str, Any]:
    """Turn what determines a run's outcome into JSON's types, with versions and device.

    Args:
        **told: Numbers, strings, lists of these and dataclasses; arrays and images become their
            digests.
    """
    return _plain(told) | run_environment()


def check_same_run(
    path: Path, saved: Fingerprint, current: Fingerprint, settings: RunSettings
) -> None:
    """Check that two fingerprints are of one run; a missing field has its default.

    Args:
        path: Path of the file, for errors.
        saved: Fingerprint in the file.
        current: Fingerprint of the run that is asked for.
        settings: Settings of that run; their class says which fields change what, and under
            `allow_rounding` a difference in rounding alone (versions of JAX, the device) is logged.

    Raises:
        ValueError: If they differ; names the differences.
    """
    kind = type(settings)
    defaults = {name: _plain(value) for name, value in defaults_of(kind).items()}
    before, now = {**defaults, **saved}, {**defaults, **current}
    # In the order of the settings, followed by the rest.
    names = [name for name in {**defaults, **saved, **current} if before.get(name) != now.get(name)]
    if not names:
        return
    effects = {name: setting.effect for name, setting in settings_of(kind).items()}
    rounding = [
        name
        for name in names
        if name in _ROUNDING or effects.get(name.partition(".")[0]) == "rounding"
    ]
    shown = names[:_NAMED]
    was = " and ".join(f"{_shown(name)} {_shown(before.get(name))}" for name in shown)
    is_now = " and ".join(_shown(now.get(name)) for name in shown)
    more = "" if shown == names else f"; {len(names) - _NAMED} more differ"
    if rounding != names:
        raise ValueError(
            f"{path} is another run's: the saved one had {was}, this one {is_now}{more} (delete "
            "the file to start over)"
        )
    if not settings.allow_rounding:
        raise ValueError(
            f"{path} is another run's: the saved one had {was}, this one {is_now}{more}, which "
            "rounds differently: continue with allow_rounding=True, or delete the file to start "
            "over"
        )
    _LOGGER.warning(
        "%s: continuing with another rounding: the saved run had %s, this one %s", path, was, is_now
    )


def weights_digest(manifest: Manifest) -> str:
    """Digest the weights and settings of a converted folder, without reading the weights."""
    stored = {
        component: {name: tensor.stored_sha256 for name, tensor in tensors.items()}
        for component, tensors in manifest.components.items()
    }
    content = json.dumps([stored, dict(manifest.files)], sort_keys=True)
    return bytes_digest(content.encode())[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        plain = {name: _plain(inner) for name, inner in value.items()}
        return {
            name if key is None else f"{name}.{key}": inner
            for name, part in plain.items()
            for key, inner in (part.items() if isinstance(part, dict) else [(None, part)])
        }
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, PIL.Image.Image):
        return f"{value.mode} image {_plain(np.asarray(value.convert('RGBA')))}"
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return f"{array.dtype}{list(array.shape)} of digest {array_digest(array)[:16]}"
    return str(value) if isinstance(value, str) else value


def _is_default(value: Any, default: Any) -> bool:
    """Tell whether a setting equals its default; arrays never do."""
    return value is default or (isinstance(value, int | float | str) and value == default)


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"

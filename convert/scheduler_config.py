"""Rules for scheduler_config.json: which values are valid, and which can be sampled here.

A config with invalid values (a negative beta, a string for a number) is neither converted nor
loaded. A valid one that is not ported is copied, so that `export` can return it, and refused only
for sampling.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from svg_jax.convert.formats.values import (
    Flag,
    Maybe,
    Name,
    Number,
    Numbers,
    Rule,
    sentence_of,
    shown,
)

FILE = "scheduler/scheduler_config.json"
COGVIDEOX = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
_LONGEST = 340  # characters of all reasons
_ANY = object()


@dataclass(frozen=True)
class _Key:
    """A key of a scheduler's config.

    Attributes:
        rule: Rule for valid values.
        default: Value by diffusers if the key is left out.
        only: Single value that is implemented; `_ANY` if all are, or the key has no effect.
    """

    rule: Rule
    default: Any
    only: Any = _ANY


_BETA, _SHIFT = Number(1e-6, 0.999), Number(0.01, 1000)
_FREE, _COUNT = Number(-1e6, 1e6), Number(0, 10**6, whole=True)
_OFF = _Key(Flag(), False, only=False)
_NULL = _Key(Maybe(_FREE), None, only=None)
_TRAINED_BETAS = Maybe(Numbers(Number(0, 1)))
_SIGMAS = {f"use_{kind}_sigmas": _OFF for kind in ("karras", "exponential", "beta")}

_COGVIDEOX_KEYS = {
    "num_train_timesteps": _Key(Number(2, 100_000, whole=True), 1000),
    "beta_start": _Key(_BETA, 0.00085),
    "beta_end": _Key(_BETA, 0.012),
    "snr_shift_scale": _Key(Number(1e-3, 1e3), 3.0),
    "rescale_betas_zero_snr": _Key(Flag(), False),
    "set_alpha_to_one": _Key(Flag(), True),
    "beta_schedule": _Key(Name(), "scaled_linear", only="scaled_linear"),
    "trained_betas": _Key(_TRAINED_BETAS, None, only=None),
    "prediction_type": _Key(Name(), "epsilon", only="v_prediction"),
    "timestep_spacing": _Key(Name(), "leading", only="trailing"),
    "steps_offset": _Key(_COUNT, 0, only=0),
    # These have no effect.
    "clip_sample": _Key(Flag(), True),
    "clip_sample_range": _Key(_FREE, 1.0),
    "sample_max_value": _Key(_FREE, 1.0),
}
_KEYS: Mapping[str, Mapping[str, _Key]] = {
    **dict.fromkeys(COGVIDEOX, _COGVIDEOX_KEYS),
    "FlowMatchEulerDiscreteScheduler": {
        **_SIGMAS,
        "num_train_timesteps": _Key(_COUNT, 1000, only=1000),
        "shift": _Key(_SHIFT, 1.0),
        "use_dynamic_shifting": _OFF,
        "invert_sigmas": _OFF,
        "stochastic_sampling": _OFF,
        "shift_terminal": _NULL,
        # These have no effect with the values above.
        "base_shift": _Key(Maybe(_FREE), 0.5),
        "max_shift": _Key(Maybe(_FREE), 1.15),
        "base_image_seq_len": _Key(Maybe(_COUNT), 256),
        "max_image_seq_len": _Key(Maybe(_COUNT), 4096),
        "time_shift_type": _Key(Name(), "exponential"),
    },
    "UniPCMultistepScheduler": {
        **_SIGMAS,
        "num_train_timesteps": _Key(_COUNT, 1000, only=1000),
        "flow_shift": _Key(_SHIFT, 1.0),
        "prediction_type": _Key(Name(), "epsilon", only="flow_prediction"),
        "use_flow_sigmas": _Key(Flag(), False, only=True),
        "solver_order": _Key(Number(1, 100, whole=True), 2, only=2),
        "solver_type": _Key(Name(), "bh2", only="bh2"),
        "predict_x0": _Key(Flag(), True, only=True),
        "lower_order_final": _Key(Flag(), True, only=True),
        "final_sigmas_type": _Key(Name(), "zero", only="zero"),
        "thresholding": _OFF,
        "disable_corrector": _Key(Numbers(_COUNT), [], only=[]),
        "solver_p": _Key(Maybe(Name()), None, only=None),
        "use_dynamic_shifting": _OFF,
        "rescale_betas_zero_snr": _OFF,
        "sigma_min": _NULL,
        "sigma_max": _NULL,
        "shift_terminal": _NULL,
        # These have no effect with the values above.
        "beta_start": _Key(Number(0, 1), 0.0001),
        "beta_end": _Key(Number(0, 1), 0.02),
        "beta_schedule": _Key(Name(), "linear"),
        "trained_betas": _Key(_TRAINED_BETAS, None),
        "timestep_spacing": _Key(Name(), "linspace"),
        "steps_offset": _Key(_COUNT, 0),
        "dynamic_thresholding_ratio": _Key(_FREE, 0.995),
        "sample_max_value": _Key(_FREE, 1.0),
        "time_shift_type": _Key(Name(), "exponential"),
    },
}


@dataclass(frozen=True)
class SchedulerEntries:
    """The checked content of scheduler_config.json.

    Attributes:
        class_name: Class of diffusers; None if the file names none.
        values: Values of all keys of the class.
        malformed: Reasons why the config is invalid.
        unported: Reasons why a valid config cannot be sampled here.
    """

    class_name: str | None
    values: Mapping[str, Any]
    malformed: tuple[str, ...]
    unported: tuple[str, ...]

    def check(self) -> None:
        """Raise a ValueError with all reasons if it is invalid or cannot be sampled here."""
        if reasons := (*self.malformed, *self.unported):
            raise ValueError(f"scheduler_config.json {sentence_of(reasons, _LONGEST)}")


def classes_of(pipeline: str | None) -> tuple[str, ...]:
    """Return the classes of schedulers that a pipeline can be sampled with here."""
    return COGVIDEOX if (pipeline or "").startswith("CogVideoX") else FLOW


def check_scheduler(entries: Mapping[str, Any], classes: Collection[str]) -> SchedulerEntries:
    """Check the content of scheduler_config.json.

    Args:
        entries: Content of the file.
        classes: Classes of schedulers that the model can be sampled with.
    """
    default = COGVIDEOX[0] if COGVIDEOX[0] in classes else None  # as in diffusers
    name: Any = entries.get("_class_name", default)
    if name is not None and (problem := Name().problem(name)) is not None:
        return SchedulerEntries(None, {}, (f"_class_name {problem}",), ())
    if name is None or name not in classes:
        reason = f"names the scheduler {name!r}; {' and '.join(classes)} are implemented"
        return SchedulerEntries(name, {}, _malformed(entries, _KEYS.get(name or "", {})), (reason,))
    keys = _KEYS[name]
    values = {key: entries.get(key, of.default) for key, of in keys.items()}
    malformed, unported = _malformed(entries, keys), []
    for key, of in keys.items():
        if of.only is not _ANY and values[key] != of.only and of.rule.problem(values[key]) is None:
            unported.append(f"sets {key} to {shown(values[key])}; only {of.only!r} is implemented")
    known = {key for key in entries if key in keys or key.startswith("_")}
    if unknown := sorted(entries.keys() - known):
        named = (key if Name().problem(key) is None else shown(key) for key in unknown)
        unported.append(f"has unknown keys: {', '.join(named)}")
    return SchedulerEntries(name, values, malformed, tuple(unported))


def _malformed(entries: Mapping[str, Any], keys: Mapping[str, _Key]) -> tuple[str, ...]:
    """List the invalid values of a class's own keys."""
    found = ((key, of.rule.problem(entries[key])) for key, of in keys.items() if key in entries)
    return tuple(f"sets {key}, which {problem}" for key, problem in found if problem is not None)


def field_problem(field: str, value: Any) -> str | None:
    """Return what is wrong with the value of a key that samplers read; None if nothing."""
    keys = {**_KEYS[FLOW[0]], **_COGVIDEOX_KEYS}
    return keys[field].rule.problem(value)

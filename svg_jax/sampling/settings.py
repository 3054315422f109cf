"""What a run's settings may be: one table, and one pure function that reads it.

Every way into a run goes through it before any work: the families' `prepare`, a pipeline's call,
and the command line. It knows nothing of a model; what a checkpoint asks for beyond it (sizes, the
shapes of arrays) is checked where the checkpoint is known.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from svg_jax.config import SparsityConfig, Warmup, dense_step_count
from svg_jax.convert.formats.values import Choice, Flag, Number, Shares, shown
from svg_jax.media.pixels import as_numpy

_SEEDS = 2**64
_FEW_STEPS = 12  # of fewer a share is rounded so much that it is worth a line


class SettingError(ValueError):
    """A setting that no run can have.

    Attributes:
        field: Name of the setting, with which the message begins.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


@dataclass(frozen=True)
class Prompts:
    """One text, or a list with one for each video."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            return f"must be a string or a list of strings: got {shown(value)}"
        if not texts:
            return "is an empty list: pass at least one prompt"
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return f"is no Unicode text: character {error.start} is half of a pair (surrogate)"
        return None


@dataclass(frozen=True)
class ArrayOf:
    """An array.

    Attributes:
        axes: How many it has; several if there is a choice.
        kinds: What its elements may be: "float", "int", "bool".
    """

    axes: tuple[int, ...]
    kinds: tuple[str, ...] = ("float",)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        if not isinstance(value, np.ndarray | jax.Array):
            return f"must be an array: got {type(value).__name__}"
        kind = _kind(value.dtype)
        if kind not in self.kinds:
            return f"must be an array of {' or '.join(self.kinds)}: got {value.dtype}"
        if value.ndim not in self.axes:
            axes = " or ".join(map(str, self.axes))
            return f"must have {axes} axes: got the shape {value.shape}"
        if not value.size:
            return f"is empty: got the shape {value.shape}"
        if kind == "float" and not _all_finite(value):
            return "has values that are not finite in float32"
        return None


@dataclass(frozen=True)
class Kind:
    """An object of some class.

    Attributes:
        fits: Whether a value is one.
        name: What it is.
    """

    fits: Callable[[Any], bool]
    name: str

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing."""
        return None if self.fits(value) else f"must be {self.name}: got {shown(value)}"


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        rule: What its values are.
        optional: Whether None stands for a default.
    """

    rule: Any
    optional: bool = True


_COUNT = Number(1, whole=True)
_SIZE = Number(1, 2**63 - 1, whole=True)  # a float holds products of them, in bytes
_LATENTS, _FEATURES = ArrayOf((5,)), ArrayOf((3,))
_MASK = ArrayOf((2,), ("float", "int", "bool"))
_ANYTHING = Kind(lambda _: True, "anything")  # images have rules of their own

SETTINGS: Mapping[str, Setting] = {
    "prompt": Setting(Prompts()),
    "negative_prompt": Setting(Prompts()),
    "image": Setting(_ANYTHING),
    "last_image": Setting(_ANYTHING),
    "height": Setting(_SIZE),
    "width": Setting(_SIZE),
    "num_frames": Setting(_SIZE),
    "num_inference_steps": Setting(_COUNT),
    "num_videos_per_prompt": Setting(_SIZE, optional=False),
    "max_sequence_length": Setting(Number(1, 8192, whole=True)),
    "guidance_scale": Setting(Number(0, 1000)),
    "true_cfg_scale": Setting(Number(0, 1000), optional=False),
    "guidance_interval": Setting(Shares()),
    "use_dynamic_cfg": Setting(Flag(), optional=False),
    "scheduler": Setting(Choice(("ddim", "dpm", "euler", "unipc"))),
    "flow_shift": Setting(Number(0.01, 1000)),
    "seed": Setting(Number(0, _SEEDS - 1, whole=True)),
    "latents": Setting(_LATENTS),
    "image_latents": Setting(_LATENTS),
    "image_noise": Setting(_LATENTS),
    "sampler_noise": Setting(ArrayOf((6,))),
    "prompt_embeds": Setting(_FEATURES),
    "negative_prompt_embeds": Setting(_FEATURES),
    "pooled_prompt_embeds": Setting(ArrayOf((2,))),
    "negative_pooled_prompt_embeds": Setting(ArrayOf((2,))),
    "prompt_attention_mask": Setting(_MASK),
    "negative_prompt_attention_mask": Setting(_MASK),
    "image_embeds": Setting(_FEATURES),
    "sparsity": Setting(Kind(lambda value: isinstance(value, SparsityConfig), "a SparsityConfig")),
    "warmup": Setting(Kind(lambda value: isinstance(value, Warmup), "a Warmup")),
    "attend": Setting(Kind(lambda value: callable(value) and _is_hashable(value), "a callable")),
    "labels": Setting(ArrayOf((3, 4), ("bool",))),
    "output_type": Setting(Choice(("np", "uint8", "latent")), optional=False),
    "vae_tiling": Setting(Flag(), optional=False),
    "callback_on_step_end": Setting(Kind(callable, "a callable")),
    "state_file": Setting(Kind(lambda value: isinstance(value, str | os.PathLike), "a path")),
    "save_every": Setting(Number(0, whole=True), optional=False),
    "resume": Setting(Flag(), optional=False),
    "fps": Setting(Number(0.01, 1000)),
    "enlarge": Setting(Number(1, 64, whole=True)),
}


def check_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check a run's settings, alone and with each other, whatever they come from.

    Args:
        values: Settings by their names; None stands for a default where there is one.

    Returns:
        The same, scalars as Python's own and other libraries' arrays as numpy's.

    Raises:
        SettingError: At the first that no run can have; names it.
    """
    checked = {}
    for field, value in values.items():
        if field not in SETTINGS:
            raise SettingError(field, "is no setting of a run")
        setting = SETTINGS[field]
        if isinstance(setting.rule, ArrayOf):
            value = _as_array(value)
        if not (value is None and setting.optional):
            problem = setting.rule.problem(value)
            if problem is not None:
                raise SettingError(field, problem)
        checked[field] = _plain(setting.rule, value)
    _check_together(checked)
    return checked


def few_steps_note(warmup: Warmup, num_inference_steps: int) -> str | None:
    """How many steps of a short run are dense, for a line; None of a run that is not short."""
    if num_inference_steps >= _FEW_STEPS:
        return None
    dense = dense_step_count(warmup, num_inference_steps)
    return f"few steps: {dense} of {num_inference_steps} dense, the first ones"


def draw_seed() -> int:
    """A seed for who wants any: it is told and recorded, so that the run can be repeated."""
    return secrets.randbelow(2**32)


def _check_together(values: Mapping[str, Any]) -> None:
    """SettingError if settings do not fit each other."""
    given = {field for field, value in values.items() if value is not None}
    for field in ("prompt", "negative_prompt"):
        other = f"{field}_embeds"
        # An empty negative prompt says no more than none.
        if {field, other} <= given and values[field] != "":
            raise SettingError(field, f"has two values: pass either a {field} or {other}")
    if "prompt" in values and "prompt_embeds" in values and not {"prompt", "prompt_embeds"} & given:
        raise SettingError("prompt", "is missing: pass either a prompt or prompt_embeds")
    if {"attend", "sparsity"} <= given:
        raise SettingError("attend", "stands in place of sparse attention: pass no sparsity")
    if {"attend", "state_file"} <= given:
        raise SettingError("state_file", "cannot tell whether an attend is that of the saved run")
    if "labels" in given and "sparsity" in values and not {"sparsity", "attend"} & given:
        raise SettingError("labels", "are for sparse attention: pass a sparsity, too")
    if "warmup" in given and "sparsity" not in given:
        raise SettingError("warmup", "is of sparse attention: pass a sparsity, too")
    if values.get("resume") and "state_file" not in given:
        raise SettingError("resume", "needs the state_file to go on from")
    _check_negatives(values)


def _check_negatives(values: Mapping[str, Any]) -> None:
    """SettingError unless there is one negative prompt for all, or one for each."""
    negative, prompt, embeds = (
        values.get(field) for field in ("negative_prompt", "prompt", "prompt_embeds")
    )
    if negative is None or isinstance(negative, str) or (prompt is None and embeds is None):
        return
    count = count_prompts(prompt, embeds)
    if len(negative) != count:
        raise SettingError(
            "negative_prompt",
            f"must be one for all or as many as the prompts: got {len(negative)} for {count}",
        )


def count_prompts(prompt: Any, prompt_embeds: Any) -> int:
    """How many prompts were given, as text or as features."""
    if prompt is None:
        return len(prompt_embeds)
    return 1 if isinstance(prompt, str) else len(prompt)


def _as_array(value: Any) -> Any:
    """Another library's array as numpy's; what is none as it is."""
    if value is None or isinstance(value, np.ndarray | jax.Array | list | tuple):
        return value
    if isinstance(value, np.generic) or not hasattr(value, "__array__"):
        return value
    try:
        return as_numpy(value, "value")
    except ValueError:  # which its rule says
        return value


def _plain(rule: Any, value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(float, value)) if isinstance(rule, Shares) and value is not None else value


def _kind(dtype: Any) -> str:
    for kind, of in (("float", jnp.floating), ("int", jnp.integer), ("bool", jnp.bool_)):
        if jnp.issubdtype(dtype, of):
            return kind
    return "other"


def _all_finite(array: Any) -> bool:
    """Whether all elements are, also when they have become float32."""
    values = np.asarray(array)
    if values.dtype != ml_dtypes.bfloat16 and values.dtype.kind == "f":
        low, high = values.min(), values.max()  # NaN comes out of either
        limit = float(np.finfo(np.float32).max)
        return bool(np.isfinite([low, high]).all() and max(-low, high) <= limit)
    return bool(np.isfinite(values.astype(np.float32)).all())


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

"""Whether settings can be those of a run: each by its rule, and all of them together."""

from collections.abc import Mapping
from typing import Any

from svg_jax.convert.formats.values import Shares
from svg_jax.sampling.settings.diffusers_names import INSTEAD_OF_VALUES
from svg_jax.sampling.settings.fields import Setting, SettingError, UnknownSettingError
from svg_jax.sampling.settings.rules import ArrayOf, as_array


def check_settings(values: Mapping[str, Any], known: Mapping[str, Setting]) -> dict[str, Any]:
    """Check settings, alone and with each other.

    Args:
        values: Some settings by their names; None stands for a default where there is one.
        known: What the fields say that there are (see `settings_of`).

    Returns:
        The same, scalars as Python's own and other libraries' arrays as numpy's.

    Raises:
        SettingError: At the first that no run can have; names it.
    """
    checked = {}
    for field, value in values.items():
        if field not in known:
            raise UnknownSettingError(field, known)
        rule = known[field].rule
        if isinstance(rule, ArrayOf):
            value = as_array(value)
        if not (value is None and known[field].optional):
            problem = rule.problem(value)
            if problem is not None:
                hint = INSTEAD_OF_VALUES.get((field, value), "") if isinstance(value, str) else ""
                raise SettingError(field, problem + hint)
        checked[field] = _plain(rule, value)
    _check_together(checked)
    return checked


def count_prompts(prompt: Any, prompt_embeds: Any) -> int:
    """Count the prompts that were given, as text or as features."""
    if prompt is None:
        return len(prompt_embeds)
    return 1 if isinstance(prompt, str) else len(prompt)


def _check_together(values: Mapping[str, Any]) -> None:
    """Raise SettingError if settings do not fit each other."""
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
    if {"attend", "state_file"} <= given and "attend_id" not in given:
        raise SettingError(
            "state_file",
            "needs an attend_id beside attend: nothing else tells whether an attend is that of the "
            "saved run",
        )
    if "attend_id" in given and "attend" not in given:
        raise SettingError("attend_id", "is the name of an attend: pass one")
    if "labels" in given and "sparsity" in values and not {"sparsity", "attend"} & given:
        raise SettingError("labels", "are for sparse attention: pass a sparsity, too")
    if "warmup" in given and "sparsity" not in given:
        raise SettingError("warmup", "is of sparse attention: pass a sparsity, too")
    for field in ("resume", "allow_rounding"):
        if values.get(field) and "state_file" in values and "state_file" not in given:
            raise SettingError(field, "needs the state_file to go on from")
    _check_negatives(values)


def _check_negatives(values: Mapping[str, Any]) -> None:
    """Raise SettingError unless there is one negative prompt for all, or one for each."""
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


def _plain(rule: Any, value: Any) -> Any:
    import numpy as np

    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(float, value)) if isinstance(rule, Shares) and value is not None else value

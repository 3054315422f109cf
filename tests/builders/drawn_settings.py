"""Values of a setting, drawn from the range that its field states and from outside it.

Nothing here names a field of which the rule says enough: one that is added is drawn, too.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st

from svg_jax import SparsityConfig, Warmup
from svg_jax.convert.formats.values import Choice, Flag, Number, Shares
from svg_jax.sampling.settings import Setting
from svg_jax.sampling.settings.rules import ArrayOf, FilePath, Images, Kind, Prompts

LARGEST = 10**12
PICTURE = np.zeros((4, 6, 3), np.uint8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


class Odd:
    """An object that can be neither shown nor compared nor converted."""

    def __repr__(self):
        raise RuntimeError("no repr")

    def __eq__(self, other):
        raise RuntimeError("no equality")

    __hash__ = object.__hash__

    def __float__(self):
        raise RuntimeError("no number")

    def __len__(self):
        raise RuntimeError("no length")


class Unhashable:
    __hash__: Any = None

    def __call__(self):
        return None


# What a `Kind` takes is picked out of these; a field of another class needs one of its own here.
OBJECTS: list[Any] = [
    *(SparsityConfig(), SparsityConfig(density=1), Warmup(), Warmup(steps=1.0), len, print),
    *("mine", "", 0.2, {"density": 0.2}, ["mine"], SparsityConfig, Unhashable()),
]
NONSENSE: Any = st.one_of(
    st.builds(Odd),
    st.builds(object),
    st.complex_numbers(),
    st.binary(max_size=3),
    st.dictionaries(TEXT, st.integers(), max_size=2),
    st.just(float("nan")),
    st.just(np.array("text")),
    st.just(range(3)),
)


def taken(rule: Any) -> Any:
    """Draw values from the range that a rule states."""
    match rule:
        case Number():
            most = LARGEST if rule.maximum is None else rule.maximum
            whole = st.integers(max(int(np.ceil(rule.minimum)), 0), int(most))
            if rule.whole:
                return whole | whole.filter(lambda number: number < 2**63).map(np.int64)
            near = np.nextafter(np.float32(most), np.float32(0))
            ends = st.sampled_from([float(rule.minimum), near])
            return whole | st.floats(rule.minimum, most) | ends
        case Flag():
            return st.booleans() | st.sampled_from([np.True_, np.False_])
        case Choice():
            return st.sampled_from(list(rule.names))
        case Shares():
            ends = st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted)
            return ends | ends.map(tuple) | ends.map(np.array)
        case Prompts():
            return TEXT | st.lists(TEXT, min_size=1, max_size=3)
        case ArrayOf():
            axes = st.sampled_from([len(rule.axes), *rule.also])
            sizes = axes.flatmap(lambda count: st.tuples(*[st.integers(1, 2)] * count))
            return st.builds(np.ones, sizes, st.sampled_from(rule.kinds))
        case Images():
            return st.sampled_from([PICTURE, [PICTURE], PICTURE[:, :, 0] / 255])
        case FilePath():
            return st.just("run.state")
        case Kind():
            return st.sampled_from([value for value in OBJECTS if rule.fits(value)])
    raise AssertionError(f"it is not known what a {type(rule).__name__} takes")


def refused(setting: Setting) -> Any:
    """Draw values that a field does not take."""
    bad = _outside(setting.rule) | NONSENSE
    return bad if setting.optional else bad | st.none()


def _outside(rule: Any) -> Any:
    match rule:
        case Number():
            beyond = st.integers(max_value=int(np.ceil(rule.minimum)) - 1)
            if rule.maximum is not None:
                beyond |= st.integers(min_value=int(rule.maximum) + 1) | st.just(10**400)
            parts = [1.5] if rule.whole else []
            odd = ["", "6", True, float("inf"), -float("inf"), [6], np.array(6), *parts]
            # Numbers, too, but none that JSON holds, as a saved run must.
            odd += [Fraction(1), np.longdouble(1), np.timedelta64(1, "s")]
            return beyond | st.sampled_from(odd)
        case Flag():
            return st.sampled_from([0, 1, "yes", "", [True]])
        case Choice():
            return TEXT.filter(lambda text: text not in rule.names) | st.integers()
        case Shares():
            ends = st.lists(st.floats(), max_size=4)
            ends = ends.filter(lambda e: len(e) != 2 or not 0 <= e[0] <= e[1] <= 1)
            return ends | st.just([0, 0.5]).map(iter)
        case Prompts():
            return st.integers() | st.sampled_from([[], ["a", 3], "\ud800"])
        case ArrayOf():
            good = np.ones((1,) * len(rule.axes), rule.kinds[0])
            bad = [good[..., None, None], good[:0], good.astype(complex), good.astype(str)]
            if "float" in rule.kinds:
                bad += [good * np.nan, good * np.float64(1e300)]
            return st.sampled_from(bad) | st.integers() | TEXT
        case Images():
            pixels = [np.zeros((4, 6), np.complex64), PICTURE[:0], PICTURE.astype(int) - 1]
            return st.sampled_from([[], 3, "no such picture.png", *pixels])
        case FilePath():
            return st.integers() | st.just([])
        case Kind():
            return st.sampled_from([value for value in OBJECTS if not rule.fits(value)])
    raise AssertionError(f"it is not known what a {type(rule).__name__} refuses")


def fitting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out, or complete, what does not go with the others."""
    values = dict(values)
    if "prompt_embeds" in values:
        values.pop("prompt", None)
    else:
        values.setdefault("prompt", "a cat")
    if "negative_prompt_embeds" in values or isinstance(values.get("negative_prompt"), list):
        values.pop("negative_prompt", None)
    if "attend" in values:
        values.pop("sparsity", None)
        values.pop("warmup", None)
        values["attend_id"] = "mine"
    else:
        values.pop("attend_id", None)
        if {"labels", "warmup"} & values.keys():
            values["sparsity"] = SparsityConfig()
    if values.get("resume") or values.get("allow_rounding"):
        values["state_file"] = "run.state"
    return values


ALONE = {"attend": None, "attend_id": None, "sparsity": None, "labels": None, "warmup": None}
# What does not go together, and the field that says so.
MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None, "prompt_embeds": None}, "prompt"),
    ({"prompt": "a", "prompt_embeds": np.ones((1, 2, 16), np.float32)}, "prompt"),
    (
        {"prompt": ["a"], "negative_prompt": ["b", "c"]}
        | {"prompt_embeds": None, "negative_prompt_embeds": None},
        "negative_prompt",
    ),
    (ALONE | {"warmup": Warmup()}, "warmup"),
    (ALONE | {"labels": np.ones((1, 1, 1), bool)}, "labels"),
    (ALONE | {"attend": len, "attend_id": "mine", "sparsity": SparsityConfig()}, "attend"),
    (ALONE | {"attend_id": "mine"}, "attend_id"),
    (ALONE | {"attend": len, "state_file": "run.state"}, "state_file"),
    ({"state_file": None, "resume": True}, "resume"),
    ({"state_file": None, "resume": False, "allow_rounding": True}, "allow_rounding"),
]

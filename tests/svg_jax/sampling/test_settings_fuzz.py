"""Settings drawn at random: what the fields say that they take is taken, all else is named."""

from typing import Any

import hypothesis
import numpy as np
import pytest
from drawn_settings import MISFITS, NONSENSE, fitting, refused, taken
from hypothesis import strategies as st
from unloaded_pipelines import PIPELINES

from svg_jax.cli.generated import every_setting
from svg_jax.convert.formats.values import Choice, Flag, Number, Shares
from svg_jax.sampling.settings import SettingError, settings_of
from svg_jax.sampling.settings.rules import Images


def rules_of(kind: Any) -> dict[str, Any]:
    """The rules of a family's fields; of samplers it has only some."""
    rules = {field: setting.rule for field, setting in settings_of(kind).items()}
    return rules | {"scheduler": Choice(kind.samplers)}


@st.composite
def cases(draw, kind):
    """Draw a call of one family, and the field that it is refused by; None if it is taken."""
    known, rules = settings_of(kind), rules_of(kind)
    chosen = draw(st.sets(st.sampled_from(sorted(known)), max_size=8))
    values = fitting({field: draw(taken(rules[field])) for field in chosen})
    optional = {field for field in known.keys() - values.keys() if known[field].optional}
    values |= dict.fromkeys(draw(st.sets(st.sampled_from(sorted(optional)), max_size=2)))
    end = draw(
        st.sampled_from(["taken", "taken", "taken", "refused", "another family's", "misfit"])
    )
    if end == "taken":
        return values, None
    if end == "misfit":
        misfit, field = draw(st.sampled_from(MISFITS))
        return values | misfit, field
    if end == "refused":
        field = draw(st.sampled_from(sorted(known)))
        return values | {field: draw(refused(known[field]))}, field
    field = draw(st.sampled_from(sorted(every_setting().keys() - known.keys())))
    return values | {field: draw(NONSENSE)}, field


def check_same(found: Any, given: Any, rule: Any) -> None:
    """Raise AssertionError unless a value has what it was given, as Python's own scalars."""
    if isinstance(rule, Number | Flag | Choice):
        assert found == given
        assert isinstance(found, int | float | str)
        assert not isinstance(found, np.generic)
    elif isinstance(rule, Shares):
        assert found == tuple(given)
    elif not isinstance(rule, Images):  # these are read
        assert found is given


@pytest.mark.parametrize("examples", [150, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_in_range_is_taken_and_all_else_refused_by_name(name, examples, monkeypatch):
    pipeline = PIPELINES[name]

    def work(*arguments, **options):
        raise AssertionError("work began")

    for method in ("prepare", "open_run_file", "denoise"):
        monkeypatch.setattr(type(pipeline), method, work)
    rules = rules_of(pipeline.settings_class)
    counts = {True: 0, False: 0}

    @hypothesis.settings(max_examples=examples, database=None, derandomize=True)
    @hypothesis.given(case=cases(pipeline.settings_class))
    def check(case):
        values, field = case
        counts[field is None] += 1
        if field is None:
            settings = pipeline.settings(**values)
            for key, value in values.items():
                if value is not None:  # which leaves it to the model
                    check_same(getattr(settings, key), value, rules[key])
            return
        with pytest.raises((ValueError, OSError)) as error:
            pipeline(**values)
        sentence = str(error.value)
        assert len(sentence) <= 500
        assert sentence.isprintable(), sentence
        if isinstance(rules.get(field), Images):
            assert field in sentence or "no such picture" in sentence
        else:
            assert isinstance(error.value, SettingError)
            assert error.value.field == field, sentence

    check()
    assert counts[True] >= sum(counts.values()) / 3

"""A field that is added to the settings is at once everywhere: nothing else has to know of it."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import typer
from flax import nnx
from saved_runs import Killed, kill_after, pipeline_of
from typer.testing import CliRunner

from svg_jax.cli.errors import failure_of
from svg_jax.cli.generated import parameters_of
from svg_jax.cli.options import with_options
from svg_jax.convert.formats.values import Flag, Number
from svg_jax.sampling import CogVideoXPipeline, WanPipeline
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.settings import SettingError, UnknownSettingError, setting
from svg_jax.sampling.wan.settings import WanSettings

OF_ALL = {
    "loudness": (
        float,
        setting(
            1.0,
            Number(0.5, 10),
            meaning="Factor on the initial noise",
            unit="parts of the usual",
            panel="Sampling",
            effect="bits",
        ),
    ),
}
OF_COGVIDEOX = {
    "grain_offset": (
        float,
        setting(
            0.0,
            Number(0, 1),
            meaning="What is added to the initial noise",
            panel="Grain",
            effect="bits",
            option="--grain",
        ),
    ),
    "in_halves": (
        bool,
        setting(
            False,
            Flag(),
            meaning="Compute in halves, and round otherwise",
            panel="Grain",
            effect="rounding",
        ),
    ),
}


def extended(kind: type, fields: dict[str, Any]) -> type:
    """A family's settings as if these fields stood in the source."""
    return dataclasses.make_dataclass(
        f"More{kind.__name__}",
        [(name, *field) for name, field in fields.items()],
        bases=(kind,),
        frozen=True,
        kw_only=True,
        eq=False,
        repr=False,
    )


class MoreCogVideoX(CogVideoXPipeline):
    settings_class = extended(CogVideoXSettings, OF_ALL | OF_COGVIDEOX)

    def prepare(self, settings: Any):
        return scaled(super().prepare(settings), settings.loudness, settings.grain_offset)


class MoreWan(WanPipeline):
    settings_class = extended(WanSettings, OF_ALL)

    def prepare(self, settings: Any):
        return scaled(super().prepare(settings), settings.loudness, 0.0)


def scaled(run, factor, offset):
    latents = run.state.latents * np.float32(factor) + np.float32(offset)
    return dataclasses.replace(run, state=run.state._replace(latents=latents))


FAMILIES = {"CogVideoX, DPM": MoreCogVideoX, "Wan, UniPC": MoreWan}
CASES = [
    ("CogVideoX, DPM", "loudness", 2.0),
    ("Wan, UniPC", "loudness", 2.0),
    ("CogVideoX, DPM", "grain_offset", 0.5),
]


def both_of(name) -> tuple[Any, Any, dict[str, Any]]:
    """A pipeline as it is, one with the fields, and a short call of either."""
    before, arguments = pipeline_of(name)
    # An untrained model predicts zeros, and the first step of DPM may forget its latents.
    graphdef, weights = nnx.split(before.transformer)
    weights = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape) / 9, weights)
    before = dataclasses.replace(before, transformer=nnx.merge(graphdef, weights))
    parts = {field.name: getattr(before, field.name) for field in dataclasses.fields(before)}
    return before, FAMILIES[name](**parts), arguments | {"num_inference_steps": 3}


def command_of(pipeline) -> tuple[typer.Typer, dict[str, str], list[Any]]:
    """A command of all families' options that makes the settings of one; its options' flags."""
    app, made = typer.Typer(), []

    @app.command()
    @with_options(given=parameters_of(*(family.settings_class for family in FAMILIES.values())))
    def generate(*, given: dict[str, Any]) -> None:
        made.append(pipeline.settings(**given))

    command: Any = typer.main.get_command(app)
    return app, {option.name: option.opts[0] for option in command.params}, made


def test_the_help_has_it_with_meaning_unit_and_default_in_its_group():
    app, flags, _ = command_of(both_of("Wan, UniPC")[1])
    options: Any = {option.name: option for option in typer.main.get_command(app).params}
    added = ["--loudness", "--grain", "--in-halves"]
    assert [flags[name] for name in OF_ALL | OF_COGVIDEOX] == added
    assert options["loudness"].help == (
        "Factor on the initial noise, in parts of the usual; default: 1.0."
    )
    assert options["loudness"].rich_help_panel == "Sampling"
    assert options["grain_offset"].rich_help_panel == "Grain"
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(text in shown for text in (*added, "─ Grain ─"))


@pytest.mark.parametrize(("name", "field", "value"), CASES)
def test_the_command_line_gives_it_and_its_range_is_checked(name, field, value):
    _, pipeline, _ = both_of(name)
    app, flags, made = command_of(pipeline)
    runner = CliRunner()
    assert runner.invoke(app, ["--prompt", "a", flags[field], str(value)]).exit_code == 0
    assert getattr(made[0], field) == value
    wrong: Any = runner.invoke(app, ["--prompt", "a", flags[field], "99"]).exception
    assert failure_of(wrong, flags).sentence.startswith(f"{flags[field]} must be a number from ")
    with pytest.raises(SettingError, match=f"{field} must be a number from .*: got 99"):
        pipeline("a", **{field: 99})


@pytest.mark.parametrize(
    ("name", "field", "is_extended"),
    [
        ("Wan, UniPC", "grain_offset", True),
        ("Wan, UniPC", "in_halves", True),
        ("CogVideoX, DPM", "loudness", False),
        ("Wan, UniPC", "loudness", False),
    ],
)
def test_a_family_without_it_refuses_it_in_the_words_of_who_asked(name, field, is_extended):
    pipeline = both_of(name)[is_extended]
    for error in (SettingError, TypeError):
        with pytest.raises(error, match=f"^this model takes no {field}$"):
            pipeline("a", **{field: True})
    app, flags, _ = command_of(pipeline)
    value = [] if field == "in_halves" else ["1"]
    refused: Any = CliRunner().invoke(app, ["--prompt", "a", flags[field], *value]).exception
    assert isinstance(refused, UnknownSettingError)
    assert failure_of(refused, flags).sentence == f"this model takes no {flags[field]}"


@pytest.mark.parametrize("name", FAMILIES)
def test_at_its_default_it_changes_no_identity(name):
    before, after, arguments = both_of(name)
    known = before.fingerprint(before.settings(**arguments))
    assert after.fingerprint(after.settings(**arguments)) == known
    louder = after.fingerprint(after.settings(**arguments, loudness=2))
    assert louder == known | {"loudness": 2}


@pytest.mark.parametrize(("name", "field", "value"), CASES)
def test_a_saved_run_knows_it_and_the_latents_show_it(name, field, value, tmp_path):
    before, pipeline, arguments = both_of(name)
    saved = arguments | {"state_file": tmp_path / "state", "save_every": 1}
    with pytest.raises(Killed):  # by the package as it was before the field
        before(**saved, callback_on_step_end=kill_after(0))
    with pytest.raises(ValueError, match=rf"had {field} [01].0, this one {value} \(delete"):
        pipeline(**saved, resume=True, allow_rounding=True, **{field: value})
    whole, other = before(**arguments).latents, pipeline(**arguments, **{field: value}).latents
    np.testing.assert_array_equal(pipeline(**saved, resume=True).latents, whole)
    with pytest.raises(Killed):
        pipeline(**saved, **{field: value}, callback_on_step_end=kill_after(0))
    resumed = pipeline(**saved, resume=True, **{field: value})
    np.testing.assert_array_equal(resumed.latents, other)
    assert np.abs(other - whole).max() > 0.01


def test_one_that_rounds_otherwise_goes_on_if_that_is_allowed(tmp_path, caplog):
    _, pipeline, arguments = both_of("CogVideoX, DPM")
    saved = arguments | {"state_file": tmp_path / "state", "save_every": 1}
    with pytest.raises(Killed):
        pipeline(**saved, callback_on_step_end=kill_after(0))
    with pytest.raises(ValueError, match=r"had in_halves False, this one True, .*allow_rounding"):
        pipeline(**saved, resume=True, in_halves=True)
    video = pipeline(**saved, resume=True, in_halves=True, allow_rounding=True)
    assert "continuing with another rounding: the saved run had in_halves False" in caplog.text
    np.testing.assert_array_equal(video.latents, pipeline(**arguments).latents)

"""scheduler_config.json: what has no meaning is refused, what is not ported is told."""

import json
import logging
import os
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svg_jax.convert import ConversionError, convert_pipeline, plan_conversion
from svg_jax.convert.run_defaults import RunDefaults
from svg_jax.convert.scheduler_config import COGVIDEOX, FLOW, check_scheduler
from svg_jax.sampling import from_pretrained
from svg_jax.sampling.schedules.config import SchedulerConfig
from svg_jax.sampling.schedules.diffusion import alphas_cumprod

DDIM = {"_class_name": COGVIDEOX[0], "prediction_type": "v_prediction"}
DDIM |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
UNIPC = {"_class_name": FLOW[1], "prediction_type": "flow_prediction", "use_flow_sigmas": True}
EULER = {"_class_name": FLOW[0], "shift": 7.0}
# By key: what is no value of it.
NO_NUMBER: list[Any] = [None, "x", "1000", [], {}, True, float("nan"), float("inf"), 1e13, 10**400]
MALFORMED: list[tuple[dict[str, Any], str, list[Any]]] = [
    (DDIM, "num_train_timesteps", [*NO_NUMBER, 0, -1, 1000.5, 10**9]),
    (DDIM, "beta_start", [*NO_NUMBER, -1, 0, 1, 1e-320]),
    (DDIM, "beta_end", [*NO_NUMBER, -0.01, 2]),
    (DDIM, "snr_shift_scale", [*NO_NUMBER, 0, -3]),
    (DDIM, "rescale_betas_zero_snr", [None, 1, "true", []]),
    (DDIM, "clip_sample_range", ["x", float("nan"), []]),
    (DDIM, "_class_name", [["x"], 3, {}, "\x1b[31m", "a" * 1000]),
    (UNIPC, "flow_shift", [*NO_NUMBER, 0, -5]),
    (UNIPC, "beta_start", [-1, "x", None]),
    (UNIPC, "disable_corrector", [None, "[]", ["a"], [True]]),
    (UNIPC, "sigma_min", ["x", [], True]),
    (EULER, "shift", [*NO_NUMBER, 0, -1]),
    (EULER, "use_dynamic_shifting", [None, 0, "no"]),
]


def classes_of(entries):
    return COGVIDEOX if entries is DDIM else FLOW


@pytest.mark.parametrize(("entries", "key", "values"), MALFORMED)
def test_a_value_without_meaning_is_malformed_and_no_config(entries, key, values):
    for value in values:
        found = check_scheduler(entries | {key: value}, classes_of(entries))
        assert len(found.malformed) == 1, value
        assert key in found.malformed[0]
        with pytest.raises(ValueError, match=key) as error:
            SchedulerConfig.from_dict(entries | {key: value}, classes_of(entries))
        assert len(str(error.value)) < 500
        assert str(error.value).isprintable()


def test_all_reasons_are_in_one_sentence():
    with pytest.raises(ValueError, match=r"num_train_timesteps.*beta_start.*steps_offset") as error:
        SchedulerConfig.from_dict(
            DDIM | {"num_train_timesteps": 0, "beta_start": -1, "steps_offset": 1}, COGVIDEOX
        )
    everything = {**dict.fromkeys(check_scheduler(DDIM, COGVIDEOX).values), **DDIM} | {"a": 1}
    everything |= dict.fromkeys(list(everything)[:8])
    with pytest.raises(ValueError, match=r"and \d+ more$") as error:
        SchedulerConfig.from_dict(everything | {"_class_name": COGVIDEOX[0]}, COGVIDEOX)
    assert len(str(error.value)) < 500


def test_every_scheduler_of_these_families_has_a_meaning():
    diffusers = pytest.importorskip("diffusers")
    for name in (*COGVIDEOX, *FLOW, "DPMSolverMultistepScheduler", "FlowMatchLCMScheduler"):
        entries = json.loads(getattr(diffusers, name)().to_json_string())
        for classes in (COGVIDEOX, FLOW):
            assert not check_scheduler(entries, classes).malformed, name
        own = COGVIDEOX if name in COGVIDEOX else FLOW
        released = entries | (DDIM if own is COGVIDEOX else UNIPC) | {"_class_name": name}
        if name == FLOW[0]:
            released = entries
        assert bool(check_scheduler(released, own).unported) == (name not in (*COGVIDEOX, *FLOW))


def test_ranges_keep_every_schedule_real_and_finite():
    for start, end in ((1e-6, 0.999), (0.999, 1e-6), (0.00085, 0.012)):
        config = SchedulerConfig(beta_start=start, beta_end=end, num_train_timesteps=100)
        alphas = alphas_cumprod(config)
        assert np.isfinite(alphas).all()
        assert ((alphas >= 0) & (alphas <= 1)).all()
    with pytest.raises(ValueError, match="beta_start must be a number"):
        SchedulerConfig(beta_start=-1.0)


@pytest.fixture
def source(tmp_path):
    """The bundled model, of which a scheduler config may be written."""
    with as_file(files("svg_jax") / "assets" / "tiny_cogvideox") as bundled:
        return Path(shutil.copytree(bundled, tmp_path / "source"))


def change(source, **entries):
    file = source / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_conversion_refuses_what_has_no_meaning(source):
    change(source, beta_start=-1, snr_shift_scale=[])
    with pytest.raises(
        ConversionError, match=r"scheduler_config.json: .*beta_start.*snr_shift"
    ) as error:
        plan_conversion(source)
    assert error.value.exit_code == 2


def test_a_conversion_tells_what_cannot_be_sampled_and_loading_refuses_it(source, tmp_path, caplog):
    change(source, prediction_type="epsilon", _class_name="CogVideoXDPMScheduler")
    with caplog.at_level(logging.WARNING):
        convert_pipeline(source, tmp_path / "out")
    (told,) = [record.getMessage() for record in caplog.records if "sampled" in record.getMessage()]
    assert "sets prediction_type to 'epsilon'" in told
    for model in (source, tmp_path / "out"):  # the first would have to be converted
        with pytest.raises(ValueError, match="only 'v_prediction' is implemented"):
            from_pretrained(model, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


RUN = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": [0, 0.4]}
DEFAULTS: dict[str, Any] = RUN | {"density": 0.5, "dense_steps": 0.4, "fps": 12, "enlarge": 2}


def test_a_folder_says_how_its_model_is_run(source, tmp_path):
    (source / "svg_jax.json").write_text(json.dumps(DEFAULTS))
    convert_pipeline(source, tmp_path / "out")
    pipe: Any = from_pretrained(tmp_path / "out")
    interval: Any = (0, 0.4)
    assert pipe.defaults == RunDefaults(**DEFAULTS | {"guidance_interval": interval})
    assert (pipe.settings("a").num_inference_steps, pipe.default_fps, pipe.defaults.enlarge) == (
        3,
        12,
        2,
    )
    sparsity, warmup = pipe.default_sparsity()
    assert (sparsity.density, warmup.steps) == (0.5, 0.4)
    settings = pipe.settings("a")
    assert {name: getattr(settings, name) for name in RUN} == RUN | {"guidance_interval": (0, 0.4)}
    assert pipe.settings("a", guidance_scale=1).guidance_scale == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3}, "there is no 'steps'"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"density": 0}, "density must be a number"),
        ({"guidance_interval": [0.5, 0.1]}, "guidance_interval is two shares"),
        ({"fps": None, "enlarge": True}, r"fps must be .*; enlarge must be"),
    ],
)
def test_a_folder_that_says_nonsense_is_refused(source, values, message):
    (source / "svg_jax.json").write_text(json.dumps(values))
    with pytest.raises(ConversionError, match=message):
        plan_conversion(source)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda file: file.symlink_to("nowhere")])
def test_defaults_that_are_no_file_are_refused_and_not_left_out(source, make):
    file = source / "svg_jax.json"
    file.unlink(missing_ok=True)
    make(file)
    with pytest.raises(ConversionError, match=r"svg_jax.json: is (no file|a link to nothing)"):
        plan_conversion(source)

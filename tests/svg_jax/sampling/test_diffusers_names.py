"""Arguments of diffusers' pipelines work, or are refused with what takes their place."""

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest

import svg_jax
from svg_jax.sampling.cogvideox.settings import CogVideoXSettings
from svg_jax.sampling.hunyuan_video.settings import HunyuanVideoSettings
from svg_jax.sampling.settings import SettingError, UnknownSettingError, settings_of
from svg_jax.sampling.settings.checks import check_settings
from svg_jax.sampling.settings.diffusers_names import INSIDE_A_VALUE, INSTEAD
from svg_jax.sampling.wan.settings import WanSettings

PAGE = (Path(__file__).parents[3] / "docs/running.md").read_text()
FAMILIES = {
    "CogVideoXPipeline": CogVideoXSettings,
    "CogVideoXImageToVideoPipeline": CogVideoXSettings,
    "HunyuanVideoPipeline": HunyuanVideoSettings,
    "HunyuanVideoImageToVideoPipeline": HunyuanVideoSettings,
    "WanPipeline": WanSettings,
    "WanImageToVideoPipeline": WanSettings,
}


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", FAMILIES)
def test_each_argument_of_a_call_works_or_names_what_takes_its_place(pipeline):
    known = settings_of(FAMILIES[pipeline])
    call = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    assert call.keys() - {"self"} <= known.keys() | INSTEAD.keys()
    assert not known.keys() & INSTEAD.keys()
    for name in call.keys() & INSTEAD.keys():
        with pytest.raises(UnknownSettingError, match=rf"^this model takes no {name}: \w") as error:
            check_settings({name: 1}, known)
        assert INSTEAD[name] in str(error.value)


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_forms_of_frames_that_there_are_not_name_one_that_there_is(output_type):
    for family in (WanSettings, CogVideoXSettings):
        with pytest.raises(SettingError, match=r"^output_type .*pass 'uint8'"):
            check_settings({"output_type": output_type}, settings_of(family))


@pytest.mark.parametrize("name", ["torch_dtype", "device_map", "use_safetensors", "subfolder"])
def test_so_do_arguments_of_from_pretrained(name):
    given: dict[str, Any] = {name: None}
    with pytest.raises(TypeError, match=re.escape(INSTEAD[name])):
        svg_jax.from_pretrained("tiny", **given)
    with pytest.raises(TypeError, match=r"takes no dtyp: did you mean dtype\?"):
        svg_jax.from_pretrained("tiny", dtyp="bfloat16")


def test_what_a_value_holds_is_told_with_the_value():
    known = settings_of(WanSettings)
    for name, instead in INSIDE_A_VALUE.items():
        with pytest.raises(
            UnknownSettingError, match=rf"^this model takes no {name}: pass "
        ) as error:
            check_settings({name: 0.2}, known)
        value, field = re.findall(r"=(\w+)\((\w+)=", instead)[0]
        getattr(svg_jax, value)(**{field: 1})
        assert instead in str(error.value)


def test_the_page_has_each_of_them():
    table = PAGE.partition("## If you come from diffusers")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)
    told = set(re.findall(r"`(\w+)", " ".join(first_cells)))
    assert INSTEAD.keys() <= told

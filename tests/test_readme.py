"""What the README shows runs as it stands."""

import re
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import jax
import pytest

from svg_jax.convert import convert_pipeline

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme") / "tiny"
    with as_file(files("svg_jax") / "assets" / "tiny_cogvideox") as source:
        convert_pipeline(source, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, converted, tmp_path, monkeypatch):
    shutil.copytree(converted, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    block = BLOCKS[number].replace("num_inference_steps=20", "num_inference_steps=4")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {})
    assert ("save_video" in block) == (tmp_path / "three.mp4").exists()

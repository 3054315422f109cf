"""The wheel without extras: attention runs, and all else says what to install."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ATTEND = """
import jax, numpy as np, svg_jax
layout = svg_jax.VideoLayout(num_frames=4, tokens_per_frame=24, text_tokens=8)
qkv = jax.random.normal(jax.random.key(0), (3, 1, layout.num_tokens, 2, 16))

@jax.jit
def attend(query, key, value):
    config = svg_jax.SparsityConfig(density=0.5, band_multiple=1)
    return svg_jax.sparse_attention(
        query, key, value, layout=layout, config=config, rng=jax.random.key(1)
    )

out, info = attend(*qkv)
assert out.shape == qkv[0].shape and np.isfinite(out).all() and info.density < 0.7, info
print("attended")
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of an environment that has the built wheel and what it requires, no more."""
    folder = tmp_path_factory.mktemp("bare")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests"))
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=tree, check=True,
                   capture_output=True)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (own,) = Distribution.discover(name="svg-jax", path=[str(packages)])
    for needed in required(own, {}).values():
        link(needed, packages)
    return python, own


def required(of: Distribution, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """Collect what a distribution requires without extras, and what that requires in turn."""
    for line in of.requires or ():
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        if "extra" in marker or name[0] in found:
            continue
        try:
            found[name[0]] = distribution(name[0])
        except ModuleNotFoundError:  # a requirement of other systems or versions of Python
            continue
        required(found[name[0]], found)
    return found


def link(needed: Distribution, packages: Path) -> None:
    """Put an installed distribution into another environment."""
    for name in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
        target = packages / name
        if not target.exists():
            target.symlink_to(Path(str(needed.locate_file(name))).resolve())


def run(python, *arguments):
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "HOME": str(python.parent)}
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, env=environment, cwd=python.parent
    )


@pytest.mark.slow
def test_attention_needs_no_extra(bare_python):
    python, _ = bare_python
    ran = run(python, "-W", "error", "-c", ATTEND)
    assert ran.stdout == "attended\n", ran.stderr


def test_the_command_line_says_what_to_install(bare_python):
    python, own = bare_python
    (script,) = own.entry_points
    module, function = script.value.split(":")
    ran = run(python, "-c", f"from {module} import {function}; {function}()", "--help")
    assert ran.returncode == 3
    assert re.fullmatch(r".+ is not installed, .+ run pip install 'svg-jax\[video\]'\n", ran.stderr)


@pytest.mark.parametrize("name", ["save_video", "from_pretrained"])
def test_so_does_what_makes_videos_in_python(bare_python, name):
    python, _ = bare_python
    ran = run(python, "-c", f"import svg_jax; assert {name!r} in dir(svg_jax); svg_jax.{name}")
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ")
    assert last.endswith("pip install 'svg-jax[video]'")

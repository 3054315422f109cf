"""The strictness that every test runs under.

No silent promotion of dtypes or ranks, warnings are errors (pyproject.toml), and the package's
shape annotations are checked on every call.
"""

import logging
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# `python -m pytest` puts the root first, where `kernels` would pass for Hugging Face's package of
# that name (transformers looks for it) and `svg_jax` would hide the installed one.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Nearly all programs run once, on little: XLA's hard work would be half of the suite's time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if version("jaxlib").startswith("0.10."):  # later ones do not know the flag
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Pallas' interpreter holds a thread of XLA's pool for each warpgroup: fewer threads than warpgroups
# wait for each other for ever. The pool is as large as the machine unless told.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("PJRT_NPROC", "8")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A first example compiles and a later one does not: times say nothing here.
hypothesis.settings.register_profile("svg-jax", deadline=None, max_examples=50)
hypothesis.settings.load_profile("svg-jax")

# Before the first `import svg_jax`: the hook only sees modules that are imported after it.
install_import_hook("svg_jax", "beartype.beartype")


_MOST_MAPS = 20_000  # of the 65,530 pieces of memory that Linux lets a process map


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Drop compiled programs before there are so many that XLA has no memory to map for the next.

    Each takes several pieces of mapped memory; past the limit a compilation ends in a crash.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@dataclass
class Result:
    """What a command ended with and printed."""

    code: int | str
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, tmp_path_factory):
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.getbasetemp()))
    # main sets these, and other tests want them back
    monkeypatch.setattr(logging.getLogger("svg_jax"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("svg_jax"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("absl"), "disabled", False)

    from svg_jax import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["svg-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return Result(exit.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def bundled(tmp_path_factory):
    """The bundled tiny model, converted."""
    from svg_jax.bundled import FOLDER
    from svg_jax.convert import convert_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "model"
    convert_pipeline(FOLDER, folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A tiny CogVideoX in diffusers' layout, which has no VAE."""
    from tiny_checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(scope="session")
def model(source):
    """The same, converted."""
    from svg_jax.convert import convert_pipeline

    convert_pipeline(source, source.parent / "model")
    return source.parent / "model"

"""The layout of the source tree: what is installed, and which way imports may point."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "convert": {"convert", "models"},
    "svg_jax": {"svg_jax", "models", "kernels", "convert"},
}


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by absolute name"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for module in imported_modules(path):
            parts = module.split(".")
            assert parts[0] not in {"torch", "diffusers", "transformers"}, f"{path}: {module}"
            if parts[0] == "svg_jax":
                target = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "svg_jax"
                assert target in MAY_IMPORT[folder], f"{path} imports {module}: an arrow back"


def test_every_package_on_disk_is_listed_for_installation():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = set()
    for folder in MAY_IMPORT:
        top = "svg_jax" if folder == "svg_jax" else f"svg_jax.{folder}"
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join([top, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(settings["packages"]) == on_disk


@pytest.mark.parametrize("folder", ["kernels", "models", "convert"])
def test_a_folder_cannot_be_imported_by_its_bare_name(folder):
    run = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert f"import svg_jax.{folder}" in run.stderr


def test_the_wheel_holds_every_module_and_the_bundled_model(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build], cwd=tree, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT).as_posix()
                expected.add(inside if folder == "svg_jax" else f"svg_jax/{inside}")
    assert packed == expected
    assert any(name.endswith("diffusion_pytorch_model.safetensors") for name in packed)

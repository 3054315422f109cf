"""The layout of the source tree: what is installed, and which way imports may point."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from house_limits import full_folders, large_functions

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"--[a-z]")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "convert": {"convert", "models"},
    "svg_jax": {"svg_jax", "models", "kernels", "convert"},
}
# Inside svg_jax: the command line stands on sampling, that on text and media, these on what lies at
# the top, where the method is.
ROOMS_MAY_IMPORT = {
    "cli": {"cli", "evaluation", "sampling", "media", "text"},
    "evaluation": {"evaluation", "sampling", "media"},
    "sampling": {"sampling", "media", "text"},
    "media": {"media"},
    "text": {"text"},
}
# What there is one of, by what every other one would have to import.
ONE_OF_EACH = {
    "hashlib": "convert/formats/digests.py",
    "fcntl": None,  # locks are filelock's
    "importlib.metadata": "convert/versions.py",
    "orbax": "benchmarks/sharded_restore.py",  # its format is written, and read, without it
}


def name_of(folder):
    """A package's name, which its folder in the tree does not tell."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "svg_jax" else ("svg_jax", *parts))


PACKAGES = {
    name_of(init.parent): init.parent
    for folder in MAY_IMPORT
    for init in (ROOT / folder).rglob("__init__.py")
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


def strings_of(tree: ast.AST) -> list[str]:
    """The strings of a module but docstrings, and the names that a field gives its option."""
    passed_over = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    keywords = (node for node in ast.walk(tree) if isinstance(node, ast.keyword))
    passed_over |= {keyword.value for keyword in keywords if keyword.arg == "option"}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [
        node.value for node in constants if isinstance(node.value, str) and node not in passed_over
    ]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_only_the_command_line_speaks_of_options(folder):
    for path in (ROOT / folder).rglob("*.py"):
        if path.parent != ROOT / "svg_jax" / "cli":
            found = [text for text in strings_of(ast.parse(path.read_text())) if FLAG.search(text)]
            assert not found, f"{path}: say the argument, which svg_jax/cli/errors.py translates"
    assert any(map(FLAG.search, strings_of(ast.parse('f"pass {a} by --seed"'))))


def rooms_of(folder):
    """Each room of a package, which is a folder or a file at its top, and the rooms it imports."""
    top = name_of(ROOT / folder)
    rooms = {path.stem for path in (ROOT / folder).iterdir() if path.stem != "__init__"}
    graph = defaultdict(set)
    for path in (ROOT / folder).rglob("*.py"):
        room = path.relative_to(ROOT / folder).with_suffix("").parts[0]
        for module in imported_modules(path):
            target = module.removeprefix(f"{top}.").split(".")[0]
            if module.startswith(f"{top}.") and room in rooms and target in rooms - {room}:
                graph[room].add(target)
    return graph


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_room_imports_one_that_imports_it(folder):
    graph = rooms_of(folder)
    assert graph, "there are no imports"
    TopologicalSorter(graph).prepare()  # names the circle, if there is one


def test_rooms_of_svg_jax_stand_on_one_another():
    graph = rooms_of("svg_jax")
    for room, targets in graph.items():
        found = targets & ROOMS_MAY_IMPORT.keys()
        assert found <= ROOMS_MAY_IMPORT.get(room, set()), f"svg_jax/{room} imports {found}"
    assert graph["cli"] & {"sampling"}, "imports are not seen"


@pytest.mark.parametrize("module", ONE_OF_EACH)
def test_there_is_one_of_each(module):
    importers = {
        path.relative_to(ROOT).as_posix()
        for folder in (*MAY_IMPORT, "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if any(f"{name}.".startswith(f"{module}.") for name in imported_modules(path))
    }
    assert importers - {"svg_jax/__init__.py"} == {ONE_OF_EACH[module]} - {None}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_public_has_the_name_of_a_module_beside_it(package):
    """Else the name would be one or the other, by what was imported first."""
    public = set(getattr(importlib.import_module(package), "__all__", ()))
    assert public.isdisjoint(path.stem for path in PACKAGES[package].iterdir())


def test_every_package_on_disk_is_listed_for_installation():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == PACKAGES.keys()


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


def test_no_room_is_too_full():
    assert full_folders(ROOT) == []


def test_no_function_is_too_large():
    assert large_functions(ROOT) == []


def test_what_exceeds_a_limit_is_counted(tmp_path):
    parameters = ", ".join(f"a{number}" for number in range(13))
    body = "".join(f"    a0 = {number}\n" for number in range(75))
    files = {
        "svg_jax/__init__.py": "from svg_jax.calls import Pipeline, public\n",
        "svg_jax/calls.py": f"def public({parameters}): pass\n"
        f"class Pipeline:\n    def __call__(self, {parameters}): pass\n"
        f"    def _inner(self, {parameters}): pass\n",
        "convert/__init__.py": "",
        "convert/plan.py": f'def longest(a0):\n    """One.\n\n    Two.\n    """\n{body[11:]}'
        f"def longer(a0):\n{body}",
        "kernels/__init__.py": "",
        "kernels/body.py": f"def _body(q_ref, {parameters}):\n{body}",
        **{f"convert/full/{number}.py": "" for number in range(16)},
        "convert/full/__init__.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert full_folders(tmp_path) == ["convert/full: 17 files"]
    found = [line.split(maxsplit=1)[1] for line in large_functions(tmp_path)]
    assert found == ["_inner: 13 parameters", "longer: 76 lines without docstring"]

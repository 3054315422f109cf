"""What a folder and a function of the package may measure, counted from its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("svg_jax", "models", "kernels", "convert")
MOST_FILES = 16
MOST_PARAMETERS = 12
MOST_LINES = 75  # without docstring
MOST_LINES_OF_A_PALLAS_BODY = 105
COMMANDS = ("svg_jax.cli.app", "svg_jax.cli.checkpoint_commands")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def full_folders(root: Path) -> list[str]:
    """Name the folders of svg_jax/ and convert/ with more files than a room holds."""
    found = []
    for package in ("svg_jax", "convert"):
        for init in sorted((root / package).rglob("__init__.py")):
            files = sum(path.is_file() for path in init.parent.iterdir())
            if files > MOST_FILES:
                found.append(f"{init.parent.relative_to(root)}: {files} files")
    return found


def large_functions(root: Path) -> list[str]:
    """Name the functions with more parameters or lines than the limits, but for public calls.

    A command may have as many parameters as it has options, and a Pallas body as it has references.
    """
    public = set(_exported(root))
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(_module(path.relative_to(root)))
            for owner, function in _functions(ast.parse(path.read_text())):
                if f"{module}.{owner or function.name}" in public and _is_call(owner, function):
                    continue
                parameters, lines = _parameters(function), _lines(function)
                is_body = package == "kernels" and any(name.endswith("_ref") for name in parameters)
                is_command = module in COMMANDS
                most_lines = MOST_LINES_OF_A_PALLAS_BODY if is_body else MOST_LINES
                where = f"{path.relative_to(root)}:{function.lineno} {function.name}"
                if len(parameters) > MOST_PARAMETERS and not (is_body or is_command):
                    found.append(f"{where}: {len(parameters)} parameters")
                if lines > most_lines:
                    found.append(f"{where}: {lines} lines without docstring")
    return found


def _module(path: Path) -> list[str]:
    parts = [*path.parts[:-1], path.stem]
    if path.stem == "__init__":
        parts.pop()
    return parts if parts[0] == "svg_jax" else ["svg_jax", *parts]


def _exported(root: Path) -> Iterator[str]:
    """The names that a package's __init__ imports from where they are defined."""
    for package in PACKAGES:
        for init in (root / package).rglob("__init__.py"):
            for node in ast.walk(ast.parse(init.read_text())):
                if isinstance(node, ast.ImportFrom):
                    yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """Each function with the class that it is a method of, or ""."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield owner, node
            yield from _functions(node, f"{owner or ''}.{node.name}")
        else:
            yield from _functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def _is_call(owner: str, function: Function) -> bool:
    """Whether a user can call it: neither private nor inside another function."""
    is_private = function.name.startswith("_") and not function.name.endswith("__")
    return not is_private and "." not in owner


def _parameters(function: Function) -> list[str]:
    """The parameters that a caller gives."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    starred = [given.vararg] if given.vararg else []
    starred += [given.kwarg] if given.kwarg else []
    return [argument.arg for argument in [*named, *starred] if argument.arg not in ("self", "cls")]


def _lines(function: Function) -> int:
    """The lines from `def` to its end, without the docstring's."""
    return _height(function) - (
        _height(function.body[0]) if ast.get_docstring(function) is not None else 0
    )


def _height(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1

"""Which tensors of a component a module's name means, whoever gave it that name.

One table holds diffusers' names, those of the first releases, which fuse several modules into one,
and ComfyUI's, all in the form of `lora_names.normal_name`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from svg_jax.convert.releases import cogvideox, hunyuan_video, wan
from svg_jax.convert.releases.renaming import Origin, number_pattern
from svg_jax.convert.tables.lora_names import COMFYUI, normal_name
from svg_jax.convert.tables.rules import Leaf

Runs = tuple[tuple[int, int], ...]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Target:
    """A module of the model that a module of a LoRA changes.

    Attributes:
        module: Name of the module, or of a tensor that is in none.
        runs: Runs of rows of the LoRA's module, [begin, end), that belong to the target, in order.
    """

    module: str
    runs: Runs

    @property
    def rows(self) -> int:
        """Number of the target's rows."""
        return sum(end - begin for begin, end in self.runs)


Targets = tuple[Target, ...]


@dataclass(frozen=True)
class ModuleNames:
    """The names of a component's modules, in the form of `lora_names.normal_name`.

    Attributes:
        shapes: Shapes of the component's tensors, by diffusers' names.
        targets: Modules that each name means.
        known: Names, with an asterisk for each number, of the modules of all models of this kind.
    """

    shapes: Shapes
    targets: Mapping[str, Targets]
    known: frozenset[str]

    def knows(self, module: str) -> bool:
        """Tell whether a model of this kind may have a module of that name."""
        return _unnumbered(normal_name(module)) in self.known


def changeable_shapes(leaves: Sequence[Leaf]) -> dict[str, tuple[int, ...]]:
    """Collect the shapes of the tensors that a LoRA may change: all but tied ones."""
    return {
        name: leaf.rule.source_shape for leaf in leaves for (name, *ties) in leaf.names if not ties
    }


def tensor_names(module: str, shapes: Shapes) -> tuple[str, str]:
    """Name a module's weight and bias; a tensor that is in no module is the weight."""
    return (module if module in shapes else f"{module}.weight"), f"{module}.bias"


def module_names(shapes: Shapes) -> ModuleNames:
    """Find all names of a component's modules.

    Args:
        shapes: Shapes of the component's tensors, by diffusers' names.
    """
    rows = {re.sub(r"\.(weight|bias)$", "", name): shape[0] for name, shape in shapes.items()}
    named = {normal_name(module): (Target(module, ((0, n),)),) for module, n in rows.items()}
    for name in [name for name in named if name.endswith("_to_out_0")]:
        named.setdefault(name.removesuffix("_0"), named[name])  # diffusers' attention, until 2023
    known = set(named)
    found = [[(origin, list(_released(origin, rows))) for origin in table] for table in _tables()]
    released = max(found, key=lambda table: sum(bool(modules) for _, modules in table))
    if 2 * sum(bool(modules) for _, modules in released) > len(released):
        for origin, modules in released:
            for source, targets in modules:
                named |= {name: targets for name in _names_of(source) if name not in named}
            known.update(_names_of(origin.source), (normal_name(t) for t, _ in origin.targets))
    return ModuleNames(shapes, named, frozenset(map(_unnumbered, known)))


def _names_of(source: str) -> tuple[str, str]:
    """Return the names of a module in a release and in ComfyUI."""
    comfyui = source
    for theirs, other in COMFYUI.items():
        comfyui = comfyui.replace(theirs, other)
    return normal_name(source), normal_name(comfyui)


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=_)(\d+|\{\})(?=_|$)", "*", name)


def _released(origin: Origin, rows: Mapping[str, int]) -> Iterator[tuple[str, Targets]]:
    """Yield the modules that a line of a release's table means here, by the release's names."""
    for numbers in _numbers(origin.targets[0][0], rows):
        modules = [(target.format(*numbers), pieces) for target, pieces in origin.targets]
        if any(module not in rows for module, _ in modules):
            continue
        sizes = {
            piece: rows[module] // len(pieces) for module, pieces in modules for piece in pieces
        }
        starts = {piece: sum(sizes[p] for p in sizes if p < piece) for piece in sizes}
        yield (
            origin.source.format(*numbers),
            tuple(
                Target(module, tuple((starts[p], starts[p] + sizes[p]) for p in pieces))
                for module, pieces in modules
            ),
        )


def _numbers(pattern: str, modules: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    if "{}" not in pattern:
        if pattern in modules:
            yield ()
        return
    for match in map(number_pattern(pattern).fullmatch, modules):
        if match:
            yield match.groups()


@cache
def _tables() -> tuple[list[Origin], ...]:
    return (
        wan.transformer_table({}),
        hunyuan_video.module_table(),
        cogvideox.transformer_table({}),
    )

"""What a pipeline is made of: modules that are there, or are loaded where they are used."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from svg_jax.stages import stage

Module = TypeVar("Module", bound=nnx.Module)


@dataclass(frozen=True, eq=False)
class Lazy(Generic[Module]):
    """A component that is loaded where it is used, and freed afterwards.

    Attributes:
        config: Config of the module.
        dtype: Dtype of its matrix products.
        load: Function that loads it onto the default device.
    """

    config: Any
    dtype: Any
    load: Callable[[], Module]

    def __repr__(self) -> str:
        return f"Lazy({type(self.config).__name__}, {np.dtype(self.dtype).name})"


Component = Module | Lazy[Module]
"""A module, loaded or not: `Component[WanVAE]`."""


@contextmanager
def in_memory(component: Component[Module]) -> Iterator[Module]:
    """Give the module of a component, which is loaded for the block if it has to be."""
    if isinstance(component, Lazy):
        what = type(component.config).__name__.removesuffix("Config")
        with stage("loading", f"loading {what}"):
            component = component.load()
    yield component


def loading_once(pipeline: Any) -> Any:
    """Copy a pipeline: the copy loads each component at most once, and frees all with itself.

    For several runs: one copy encodes all prompts and is dropped before another loads the
    transformer.
    """
    if isinstance(pipeline, Lazy):
        return dataclasses.replace(pipeline, load=cache(pipeline.load))
    if not dataclasses.is_dataclass(pipeline) or isinstance(pipeline, type):
        return pipeline
    parts = {field.name: getattr(pipeline, field.name) for field in dataclasses.fields(pipeline)}
    copies = {name: loading_once(part) for name, part in parts.items()}
    changed = {name: copy for name, copy in copies.items() if copy is not parts[name]}
    return dataclasses.replace(pipeline, **changed) if changed else pipeline


def component_names(pipeline: Any) -> Iterator[str]:
    """Name the modules of a pipeline, and those of its parts."""
    for field in dataclasses.fields(pipeline):
        part = getattr(pipeline, field.name)
        if isinstance(part, Lazy | nnx.Module):
            yield field.name
        elif dataclasses.is_dataclass(part):
            yield from component_names(part)


def run_encoder(encoder: nnx.Module, *inputs: Array, **options: int) -> Any:
    """Run an encoder, compiled; every array of its output becomes float32.

    Args:
        encoder: Module to call.
        *inputs: Arrays that it is called with.
        **options: Settings that it is compiled for.
    """
    return _run_encoder(*nnx.split(encoder), inputs, tuple(options.items()))


@partial(jax.jit, static_argnums=(0, 3))
def _run_encoder(graphdef: Any, weights: Any, inputs: tuple[Array, ...], options: Any) -> Any:
    out = nnx.merge(graphdef, weights)(*inputs, **dict(options))
    return jax.tree.map(lambda array: array.astype(jnp.float32), out)


def check_finite(field: str, array: Array | np.ndarray) -> None:
    """Raise ValueError if an array holds NaN or infinity."""
    if not np.isfinite(np.asarray(array)).all():
        raise ValueError(f"{field} has values that are not finite")

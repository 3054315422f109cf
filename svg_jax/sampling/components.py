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

Module = TypeVar("Module", bound=nnx.Module)


@dataclass(frozen=True, eq=False)
class Lazy(Generic[Module]):
    """A component that is loaded where it is used and freed behind it.

    Attributes:
        config: Of the module.
        dtype: Of its matrix products.
        load: Loads it onto the default device.
    """

    config: Any
    dtype: Any
    load: Callable[[], Module]

    def __repr__(self) -> str:
        return f"Lazy({type(self.config).__name__}, {np.dtype(self.dtype).name})"


@contextmanager
def in_memory(component: Module | Lazy[Module]) -> Iterator[Module]:
    """The module of a component, for as long as the block lasts if it has to be loaded for it."""
    yield component.load() if isinstance(component, Lazy) else component


def loading_once(pipeline: Any) -> Any:
    """A copy whose components are loaded at most once, and freed with the copy.

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


def run_encoder(encoder: nnx.Module, *inputs: Array, **options: int) -> Any:
    """What an encoder makes of its inputs, compiled, every array of it in float32.

    Args:
        encoder: The module.
        *inputs: What it is called with.
        **options: Settings that it is compiled for.
    """
    return _run_encoder(*nnx.split(encoder), inputs, tuple(options.items()))


@partial(jax.jit, static_argnums=(0, 3))
def _run_encoder(graphdef: Any, weights: Any, inputs: tuple[Array, ...], options: Any) -> Any:
    out = nnx.merge(graphdef, weights)(*inputs, **dict(options))
    return jax.tree.map(lambda array: array.astype(jnp.float32), out)


def repeat_each(array: Array | None, times: int) -> Array | None:
    """Every batch entry so many times, for several videos of a prompt."""
    return None if array is None else jnp.repeat(array, times, axis=0)


def check_finite(name: str, array: Array | np.ndarray) -> None:
    """ValueError if an array holds NaN or infinity."""
    if not np.isfinite(np.asarray(array)).all():
        raise ValueError(f"{name} has values that are not finite")


def component_names(pipeline: Any) -> Iterator[str]:
    """Names of the modules of a pipeline, those in a part of their own among them."""
    for field in dataclasses.fields(pipeline):
        part = getattr(pipeline, field.name)
        if isinstance(part, Lazy | nnx.Module):
            yield field.name
        elif dataclasses.is_dataclass(part):
            yield from component_names(part)

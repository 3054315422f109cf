"""One family's transformer in this package and in diffusers, for the tests of all families."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from parity import jitted, ported, randomised

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """What the tests of transformers need of one family.

    Attributes:
        reference: diffusers' class.
        model: The class here.
        config: The class of its config.
        rules: Makes the table of names from a config.
        cases: Variants of diffusers' config, and sizes that `make_inputs` takes; by name.
        make_inputs: Random arguments of a call, from a variant, its sizes and a seed; the batch has
            two unlike entries.
        reference_velocity: What diffusers' module predicts of such arguments.
        layers: Every layer's outputs of a call, here and in diffusers, each layer given what
            diffusers' has; from both modules, the variant's sizes and arguments.
        keep: Names of modules that diffusers leaves in float32.
        seeds: Random models that an error in bfloat16 is averaged over.
    """

    reference: Any
    model: Any
    config: Any
    rules: Callable
    cases: Mapping[str, tuple]
    make_inputs: Callable[..., Inputs]
    reference_velocity: Callable[[Any, Inputs], np.ndarray]
    layers: Callable[..., Iterator[tuple[Any, Any]]]
    keep: tuple[str, ...] = ()
    seeds: int = 8

    def pair(self, variant, seed, dtype=torch.float32):
        """diffusers' module with random weights, and the one here with the same."""
        reference = randomised(self.reference(**variant), seed, dtype, self.keep)
        config = self.config.from_dict(dict(reference.config))
        ours = jnp.dtype(str(dtype).removeprefix("torch."))
        return reference, ported(
            lambda: self.model(config, dtype=ours, param_dtype=ours, rngs=nnx.Rngs(0)),
            self.rules(config),
            reference,
        )


def our_velocity(model, inputs):
    """What the module here predicts, in float32."""
    velocity, _ = jitted(model, **jax.tree.map(jnp.asarray, inputs))
    assert velocity.dtype == model.dtype
    return np.asarray(velocity.astype(jnp.float32))


def recorded_calls(modules, run):
    """What each of diffusers' modules was called with and gave back while `run` ran."""
    calls = []
    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
        )
        for module in modules
    ]
    run()
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(modules)
    return calls


def layers_of(stack):
    """The layers of a stack, whose weights are one array a name."""
    graph, state = nnx.split(stack)
    for layer in range(jax.tree.leaves(state)[0].shape[0]):
        yield nnx.merge(graph, jax.tree.map(lambda x, layer=layer: x[layer], state))


def as_array(*tensors):
    """Tensors of tokens behind each other, as one array."""
    return jnp.asarray(torch.cat(tensors, dim=1).numpy())

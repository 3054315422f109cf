"""What the parity tests share: a random model in both libraries, and how far apart they are."""

import math

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from svg_jax.convert.tables.rules import convert_state

TOLERANCE = 1e-5
TABLES = ("pos_embed", "scale_shift_table", "shared.weight")


def randomised(module, seed, dtype=torch.float32, in_float32=()):
    """The torch module with all of its parameters and tables random, and its evaluation mode on.

    Parameters of the modules named `in_float32` stay in it whatever `dtype` is.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("gamma"):
                tensor.copy_(0.3 * noise + 1)
            elif tensor.ndim == 1:
                gain = "norm" in name and name.endswith("weight") and "linear" not in name
                tensor.copy_(0.3 * noise + gain)
            elif any(word in name for word in TABLES):
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
    for name, parameter in module.named_parameters():
        if not set(in_float32) & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module.eval()


class ExactSinusoids(torch.nn.Module):
    """diffusers' `Timesteps`, its frequencies rounded once."""

    def forward(self, times):
        exponents = torch.tensor(-math.log(10_000)) * torch.arange(128) / 128
        frequencies = torch.exp(exponents.double()).float()
        angles = times[:, None].float() * frequencies[None]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def ported(make, rules, reference, unused=()):
    """Our module with the reference's weights, in the dtypes that it makes them with."""
    tensors = {
        name: tensor.float().numpy()
        for name, tensor in reference.state_dict().items()
        if name not in unused
    }
    graph, state = nnx.split(nnx.eval_shape(make))
    leaves = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))
    values = nnx.traversals.flatten_mapping(convert_state(tensors, rules))
    dtypes = {tuple(str(key) for key in path): leaf.dtype for path, leaf in leaves.items()}
    assert dtypes.keys() == values.keys()
    values = {path: jnp.asarray(x, dtypes[path]) for path, x in values.items()}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(values))
    return nnx.merge(graph, state)


@nnx.jit
def jitted(model, *inputs, **more):
    return model(*inputs, **more)


def relative_error(ours, reference):
    return np.abs(ours - reference).max() / np.abs(reference).max()


def bfloat16_errors(make_pair, make_inputs, run_reference, run_ours, seeds=4):
    """RMS errors of ours and of the reference in bfloat16, each over some random models.

    Weights are rounded to bfloat16 before anything is computed: what is measured is the arithmetic.
    """
    ours, theirs = [], []
    for seed in range(seeds):
        reference, model = make_pair(seed)
        inputs = make_inputs(seed)
        rounded = run_reference(reference, *inputs)
        exact = run_reference(reference.float(), *inputs)
        ours.append(np.mean((run_ours(model, *inputs) - exact) ** 2))
        theirs.append(np.mean((rounded - exact) ** 2))
    return np.sqrt(np.mean(ours)), np.sqrt(np.mean(theirs))

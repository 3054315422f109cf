"""Digests of the programs of one denoising step: where they are equal, a change moved nothing.

    python benchmarks/step_hlo.py > before.txt                 # at one commit
    python benchmarks/step_hlo.py --compare before.txt         # at another

One line a case: the bundled model and full-size transformers, dense and sparse, guided or not, as
lowered for the default device. Nothing is computed and no weight is made: 14 billion parameters
take seconds on a CPU. A digest is of what each output is as a function of the inputs: the order of
operations, names, calls, repeated and unused expressions do not count. On a GPU a Pallas kernel's
own program counts to the letter, with the lines of source that it holds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from forward import CASES, INVENTORIES, Case

from svg_jax.attention import StepState, attend_dense, attend_sparse
from svg_jax.bundled import FOLDER
from svg_jax.config import SparsityConfig
from svg_jax.convert.formats.digests import bytes_digest
from svg_jax.models import CogVideoXConfig, CogVideoXTransformer
from svg_jax.sampling.conditions import Conditions
from svg_jax.sampling.denoising import denoise_step
from svg_jax.sampling.schedules.steps import StepCoefficients, initial_state

TINY = "the bundled model"
NAMES = (TINY, *CASES)
NUMBERS = StepCoefficients(*[jax.ShapeDtypeStruct((), jnp.float32)] * len(StepCoefficients._fields))
NOT_PROGRAM = {"sym_name", "sym_visibility", "callee", "arg_attrs", "res_attrs"}


def step_of(name: str, *, sparse: bool, guided: bool) -> tuple[Callable[..., Any], Any]:
    """Make a case's step as a function of abstract arrays, and those.

    Args:
        name: Name of the case, one of NAMES.
        sparse: Whether the layers behind the warm-up attend sparsely.
        guided: Whether by classifier-free guidance.
    """
    module, latents, text, more, attend = _tiny() if name == TINY else _full_size(CASES[name])
    graph, weights = nnx.split(module)
    sampler = "dpm" if isinstance(module, CogVideoXTransformer) else "unipc"
    inputs = {
        "weights": weights,
        "state": jax.eval_shape(partial(initial_state, sampler), latents),
        "coefficients": NUMBERS._replace(keep=None) if sampler == "dpm" else NUMBERS,
        "text": {"embeds": text, **more},
        "scale": jax.ShapeDtypeStruct((), jnp.float32) if guided else None,
        "noise": latents,
        "key": jax.eval_shape(jax.random.key, 0) if sparse else None,
    }

    def step(inputs):
        text, key = inputs.pop("text"), inputs.pop("key")
        return denoise_step(
            graph,
            attend if sparse else attend_dense,
            conditions=Conditions(call=_call, text=text, negative_text=text if guided else None),
            step_state=StepState(key) if sparse else None,
            **inputs,
        )

    return step, inputs


def _tiny() -> tuple[Any, ...]:
    config = CogVideoXConfig.from_dict(
        json.loads((FOLDER / "transformer" / "config.json").read_text())
    )
    module = nnx.eval_shape(lambda: CogVideoXTransformer(config, rngs=nnx.Rngs(0)))
    latents = jax.ShapeDtypeStruct((1, 16, 3, 48, 64), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 16, config.text_embed_dim), jnp.float32)
    return module, latents, text, {}, attend_sparse(SparsityConfig(), config.num_layers)


def _full_size(case: Case) -> tuple[Any, ...]:
    entries = json.loads((INVENTORIES / f"{case.inventory}.json").read_text())["config"]
    config, kind = case.config(entries), jnp.bfloat16
    module = nnx.eval_shape(
        lambda: case.make(config, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(0))
    )
    latents = jax.ShapeDtypeStruct(case.latents, jnp.float32)
    more = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in case.more}
    if case.real_text is not None:
        more["text_length"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    attend = attend_sparse(case.preset.sparsity, case.layers, warmup=case.preset.warmup)
    return module, latents, jax.ShapeDtypeStruct((1, *case.text), jnp.float32), more, attend


def _call(model, hidden, timestep, *, text, number, image_features, **to):
    """See `Conditions.call`."""
    del number, image_features
    more = {name: value for name, value in text.items() if name != "embeds"}
    return model(hidden, text["embeds"], timestep, **more, **to)


def digest_of(function: Callable[..., Any], *arguments: Any) -> str:
    """Digest what a function computes, as lowered for the default device.

    Args:
        function: A function that traces.
        arguments: Arrays, or their shapes and dtypes.
    """
    module: Any = jax.jit(function).lower(*arguments).compiler_ir()
    with module.context:
        functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
        main = functions["main"]
        return _hash(*_results(main.regions[0].blocks[0], functions, {}))[:16]


def _hash(*parts: str) -> str:
    return bytes_digest("\0".join(parts).encode())


def _results(block: Any, functions: dict[str, Any], known: dict[Any, str], place: str = "") -> Any:
    """Hashes of what a block returns, and of what it does besides.

    Args:
        block: Operations, in an order that defines before it uses.
        functions: Functions of the module, by name.
        known: Hashes of values from outside, and of the block's arguments if these are known.
        place: What tells the arguments of one block from those of another.
    """
    known, effects = dict(known), []
    for number, argument in enumerate(block.arguments):
        known.setdefault(argument, _hash("argument", place, str(number), str(argument.type)))
    for op in block.operations:
        operands = [known[value] for value in op.operands]
        name, types = op.operation.name, [str(value.type) for value in op.results]
        if name in ("func.return", "stablehlo.return"):
            return [*operands, *effects]
        if name == "func.call":
            called = functions[op.attributes["callee"].value].regions[0].blocks[0]
            arguments = dict(zip(called.arguments, operands, strict=True))
            found = _results(called, functions, arguments)
            effects += found[len(types) :]
        elif name == "stablehlo.case" and len(op.regions) == 1:
            # A choice of one, as `jax.lax.platform_dependent` leaves it.
            found = _results(op.regions[0].blocks[0], functions, known)
            effects += found[len(types) :]
        else:
            names = {getattr(each, "name", each) for each in op.attributes} - NOT_PROGRAM
            attributes = [f"{each} = {op.attributes[each]}" for each in sorted(names)]
            this = _hash(name, *attributes, *operands, *types)
            inner = [
                result
                for number, region in enumerate(op.regions)
                for nested in region.blocks
                for result in (f"region {number}", *_results(nested, functions, known, this))
            ]
            found = [_hash(this, *inner, str(number)) for number in range(len(types))]
            if not types or "has_side_effect = true" in attributes:
                effects.append(_hash(this, *inner))
        known.update(zip(op.results, found, strict=False))
    raise ValueError(f"a block of {len(block.operations)} operations returns nothing")


def main() -> int:
    """Parse the command line, print digests; 1 if one differs from those to compare with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="", help="parts of names of the cases to look at")
    parser.add_argument("--compare", type=Path, help="what this script printed at another commit")
    args = parser.parse_args()
    before = {}
    if args.compare is not None:
        lines = args.compare.read_text().splitlines()
        before = {name: digest for digest, name in (line.split(" ", 1) for line in lines)}
    differ = 0
    for case in NAMES:
        for kind in ("dense", "dense, guided", "sparse", "sparse, guided"):
            name = f"{case}: {kind}"
            if not any(part.lower() in name.lower() for part in args.cases.split(",")):
                continue
            step, inputs = step_of(case, sparse="sparse" in kind, guided="guided" in kind)
            digest = digest_of(step, inputs)
            moved = args.compare is not None and before.get(name) != digest
            differ += moved
            print(digest, name + (f" (before: {before.get(name)})" if moved else ""), flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())

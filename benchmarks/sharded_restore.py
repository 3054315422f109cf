"""Plain orbax restores a converted transformer onto four devices, each leaf cut along one axis.

The devices are four of XLA's on one CPU. Every tensor, put together again, is compared with the
manifest's digest of what was converted; the exit code is 1 if one differs.

    python benchmarks/convert_memory.py --model wan-1.3b --layers 30 --keep FOLDER
    python benchmarks/sharded_restore.py FOLDER
    python benchmarks/sharded_restore.py FOLDER --leaf blocks.feed_forward.input.kernel
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.nnx import traversals
from jax.sharding import NamedSharding, PartitionSpec
from measured import provenance_of
from timing import write_entry

from svg_jax.convert.checkpoint.folder import open_folder
from svg_jax.convert.checkpoint.tensors import open_tensors
from svg_jax.convert.formats.digests import array_digest


def target_of(shape: tuple[int, ...], dtype: np.dtype, mesh: jax.sharding.Mesh):
    """Cut a leaf in four along its last axis that can be: so no device has whole chunks."""
    spec: list[str | None] = [None] * len(shape)
    for axis in reversed(range(len(shape))):
        if shape[axis] % 4 == 0:
            spec[axis] = "devices"
            break
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def main() -> int:
    """Restore, compare and print; 1 if a tensor differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="converted folder")
    parser.add_argument("--leaf", help="one leaf of the transformer, e.g. blocks.ffn_out.kernel")
    parser.add_argument("--json", type=Path, help="file to put the figures into")
    parser.add_argument("--name", default="transformer", help="of the entry there")
    args = parser.parse_args()

    tensors = open_tensors(open_folder(args.folder))["transformer"]
    leaves = {tensor.leaf.path: tensor.store for tensor in tensors.values()}
    mesh = jax.make_mesh((4,), ("devices",))
    wanted = {
        path: target_of(tuple(store.shape), store.dtype.numpy_dtype, mesh)
        if args.leaf in (None, ".".join(path))
        else ocp.PLACEHOLDER
        for path, store in leaves.items()
    }
    restore_args = {
        path: ocp.ArrayRestoreArgs(sharding=target.sharding)
        if isinstance(target, jax.ShapeDtypeStruct)
        else ocp.RestoreArgs()
        for path, target in wanted.items()
    }
    started = time.perf_counter()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(
            (args.folder / "transformer" / "weights").absolute(),
            args=ocp.args.PyTreeRestore(
                item=traversals.unflatten_mapping(wanted),
                restore_args=traversals.unflatten_mapping(restore_args),
            ),
        )
    restored = traversals.flatten_mapping(tree)
    seconds = time.perf_counter() - started

    nbytes, wrong, shards, compared = 0, [], 0, 0
    for name, tensor in tensors.items():
        array = restored[tensor.leaf.path]
        if array is ocp.PLACEHOLDER:
            continue
        compared += 1
        shards = max(shards, len({str(shard.index) for shard in array.addressable_shards}))
        part = np.asarray(array[tensor.layer] if tensor.leaf.rule.stacked else array)
        nbytes += part.nbytes
        if array_digest(tensor.leaf.rule.inverse(part)) != tensor.record.stored_sha256:
            wrong.append(name)
    row = {
        "measured": provenance_of("benchmarks/sharded_restore.py"),
        "tensors": compared,
        "bytes": nbytes,
        "devices": len(jax.devices()),
        "parts of a leaf": shards,
        "s": round(seconds, 1),
        "tensors that differ": len(wrong),
    }
    one = f" --leaf {args.leaf}" if args.leaf else ""
    row["measured"]["command"] = f"python benchmarks/sharded_restore.py FOLDER{one}"
    write_entry(args.json, "sharded restore", args.name, row)
    print(json.dumps(row, indent=1))
    return int(bool(wrong) or compared == 0 or shards != 4)


if __name__ == "__main__":
    sys.exit(main())

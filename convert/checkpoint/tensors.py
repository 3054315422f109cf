"""The source's tensors in a converted folder: where each lies, and its bytes as they were."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from svg_jax.convert.checkpoint.folder import WEIGHTS, ConvertedFolder, check_weights
from svg_jax.convert.checkpoint.manifest import TensorRecord
from svg_jax.convert.checkpoint.orbax_writer import open_leaves, readable
from svg_jax.convert.errors import DamageError
from svg_jax.convert.formats.digests import array_digest
from svg_jax.convert.tables.rules import Leaf


@dataclass(frozen=True)
class ConvertedTensor:
    """Where one source tensor lies in the converted folder.

    Attributes:
        leaf: The leaf that it is in.
        layer: Which layer of it, if the leaf is stacked.
        store: The leaf on disk.
        record: What the manifest says of the tensor.
    """

    leaf: Leaf
    layer: int
    store: ts.TensorStore
    record: TensorRecord

    def read(self) -> np.ndarray:
        """The tensor in the source's layout."""
        rule = self.leaf.rule
        part = self.store[self.layer] if rule.stacked else self.store
        # In the order in which it lies: read so, nothing has to be turned.
        return part.transpose(rule.inverse_axes).read().result().reshape(rule.source_shape)


def open_tensors(folder: ConvertedFolder) -> dict[str, dict[str, ConvertedTensor]]:
    """Per component, every source tensor's place in its orbax checkpoint.

    Raises:
        ConversionError: If a config cannot be read.
        DamageError: If a checkpoint is not what the manifest says.
    """
    sources = {}
    for component, records in folder.manifest.components.items():
        leaves, files = check_weights(folder, component)
        stores = open_leaves(folder.path / component / WEIGHTS, files)
        sources[component] = {
            name: ConvertedTensor(leaf, layer, stores[leaf.path], records[name])
            for leaf in leaves
            for layer, names in enumerate(leaf.names)
            for name in names
        }
    return sources


def read_checked(component: str, name: str, tensor: ConvertedTensor) -> np.ndarray:
    """Read a tensor and compare it with the manifest's digest.

    Raises:
        DamageError: If it differs.
    """
    with readable(Path(component), tensor.leaf.path):
        array = tensor.read()
    if array_digest(array) != tensor.record.stored_sha256:
        raise DamageError(
            f"{component}: {name} is not what was converted: the disk or someone changed it; "
            "convert the source again."
        )
    return array

"""Read the source's tensors from a converted folder, as they were in the source."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from svg_jax.convert.checkpoint.folder import ConvertedFolder, open_weights
from svg_jax.convert.checkpoint.manifest import TensorRecord
from svg_jax.convert.checkpoint.orbax_writer import readable
from svg_jax.convert.errors import DamageError
from svg_jax.convert.formats.digests import array_digest
from svg_jax.convert.tables.rules import Leaf


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor of the source in a converted folder.

    Attributes:
        component: Name of its component.
        name: Name of the tensor in the source.
        leaf: Leaf that holds it.
        layer: Index of its layer, if the leaf is stacked.
        store: The opened leaf.
        record: Record in the manifest.
    """

    component: str
    name: str
    leaf: Leaf
    layer: int
    store: ts.TensorStore
    record: TensorRecord

    def read(self) -> np.ndarray:
        """Read the tensor in the source's layout and compare it with its digest.

        Raises:
            DamageError: If it differs or cannot be read.
            RefusedError: If the system does not let it be read.
        """
        rule = self.leaf.rule
        with readable(Path(self.component), self.leaf.path):
            part = self.store[self.layer] if rule.stacked else self.store
            # Read in the order on disk, which needs no transposition.
            array = part.transpose(rule.inverse_axes).read().result().reshape(rule.source_shape)
        if array_digest(array) != self.record.stored_sha256:
            raise DamageError(
                f"{self.component}: {self.name} is not what was converted: the disk or someone "
                "changed it; convert the source again."
            )
        return array


def open_tensors(folder: ConvertedFolder) -> dict[str, dict[str, ConvertedTensor]]:
    """Open all tensors of each component, by their names in the source.

    Raises:
        DamageError: If a checkpoint is not as the manifest says.
        RefusedError: If the system does not let it be read.
    """
    sources = {}
    for component, records in folder.manifest.components.items():
        leaves, stores = open_weights(folder, component)
        sources[component] = {
            name: ConvertedTensor(component, name, leaf, layer, stores[leaf.path], records[name])
            for leaf in leaves
            for layer, names in enumerate(leaf.names)
            for name in names
        }
    return sources

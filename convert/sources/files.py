"""Read each file of a source once, and keep what was read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from svg_jax.convert.formats.checked_files import FileState, file_state
from svg_jax.convert.formats.json_file import JsonFile, read_json_file
from svg_jax.convert.formats.stored_tensor import StoredTensor
from svg_jax.convert.sources.weights import folder_of, read_weights


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source that were read, and their states before that.

    Attributes:
        weights_key: Key of the weights to read; see `ConversionSettings`.
    """

    weights_key: str | None = None
    _weights: dict[tuple[Path, str | None], Mapping[str, StoredTensor]] = field(
        default_factory=dict
    )
    _objects: dict[Path, JsonFile] = field(default_factory=dict)
    _states: dict[Path, Mapping[Path, FileState]] = field(default_factory=dict)

    def weights(
        self, place: Path, allowed: Iterable[Path], variant: str | None
    ) -> Mapping[str, StoredTensor]:
        """Find the tensors of a component; see `read_weights`."""
        if (place, variant) not in self._weights:
            self.states(folder_of(place))
            found = read_weights(place, allowed, variant, self.weights_key)
            self._weights[place, variant] = found
        return self._weights[place, variant]

    def json(self, file: Path) -> JsonFile:
        """Read a JSON file; see `read_json_file`."""
        if file not in self._objects:
            self.states(file.parent)
            self._objects[file] = read_json_file(file)
        return self._objects[file]

    def states(self, folder: Path) -> Mapping[Path, FileState]:
        """Return the states that the files of a folder had before the first was read."""
        if folder not in self._states:
            files = (file for file in folder.glob("*") if file.exists())
            self._states[folder] = {file: file_state(file) for file in files}
        return self._states[folder]

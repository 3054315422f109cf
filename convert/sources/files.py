"""A source's files, each of which is read once: whoever asks again gets what was read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from svg_jax.convert.formats.checked_files import FileState, file_state
from svg_jax.convert.formats.json_file import JsonFile, read_json_file
from svg_jax.convert.formats.stored_tensor import StoredTensor
from svg_jax.convert.sources.weights import is_weights, read_file, read_weights


@dataclass(frozen=True)
class SourceFiles:
    """What was read of a source, and the state that each file was in before.

    Attributes:
        weights_key: What stands before the names of the weights that are meant, where there are
            several.
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
        """Find the tensors of a folder or file, by their names there.

        Args:
            place: The folder, or the file of weights.
            allowed: See `read_weights`.
            variant: See `read_weights`.

        Raises:
            ConversionError: See `read_weights` and `read_file`.
        """
        if (place, variant) not in self._weights:
            self.states(folder_of(place))
            self._weights[place, variant] = (
                read_weights(place, allowed, variant, self.weights_key)
                if place == folder_of(place)
                else read_file(place, self.weights_key)
            )
        return self._weights[place, variant]

    def json(self, file: Path) -> JsonFile:
        """Read a file of JSON.

        Raises:
            ConversionError: See `read_json_file`.
        """
        if file not in self._objects:
            self.states(file.parent)
            self._objects[file] = read_json_file(file)
        return self._objects[file]

    def states(self, folder: Path) -> Mapping[Path, FileState]:
        """Tell the state that the files of a folder were in before the first was read."""
        if folder not in self._states:
            files = (file for file in folder.glob("*") if file.exists())
            self._states[folder] = {file: file_state(file) for file in files}
        return self._states[folder]


def folder_of(place: Path) -> Path:
    """Name the folder of a component, of which that or a file of weights is given."""
    return place.parent if is_weights(place) and not place.is_dir() else place

"""Versions of installed packages."""

import importlib.metadata
from collections.abc import Iterable


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package, by name."""
    return {name: importlib.metadata.version(name) for name in packages}

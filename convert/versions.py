"""Which versions of packages are installed."""

import importlib.metadata
from collections.abc import Iterable


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Give the installed version of each package, by its name."""
    return {name: importlib.metadata.version(name) for name in packages}

"""What to install where a package of an optional extra is missing."""

_OWN = __name__.partition(".")[0]


def missing_package(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Name the extra to install for a package that is not there.

    Args:
        error: The failed import.

    Returns:
        An error of the same package with that sentence; the given error if a module of this
        package is what is missing.
    """
    package = (error.name or _OWN).partition(".")[0]
    if package == _OWN:
        return error
    return ModuleNotFoundError(
        f"{package} is not installed, and checkpoints, videos and the command line need it: run "
        "pip install 'svg-jax[video]'",
        name=package,
    )

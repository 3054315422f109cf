"""What ends a conversion, or the use of what was converted."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted, or is not what it says: what, where, and what to do.

    `exit_code` is what the command line ends with.
    """

    exit_code = 2


class RefusedError(ConversionError):
    """The system does not let it be done: no room, no right, another run is at work."""

    exit_code = 3


class DamageError(ConversionError):
    """A converted folder does not hold what was converted."""

    exit_code = 4

"""Errors that end a conversion, or the use of a converted folder."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted or used. The message says what is wrong, where, what to do.

    Attributes:
        exit_code: Exit code of the command line.
    """

    exit_code = 2


class RefusedError(ConversionError):
    """The system refuses: the disk is full, permissions are missing, another run is at work."""

    exit_code = 3


class DamageError(ConversionError):
    """A converted folder is not as it was converted."""

    exit_code = 4

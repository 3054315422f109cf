"""Checks that several models make of their inputs' shapes; errors name the argument."""

from collections.abc import Mapping

from jaxtyping import Array


def check_channels(name: str, array: Array, channels: int, why: str = "") -> None:
    """Raise ValueError unless [batch, channels, ...] has the model's channels and some elements.

    Args:
        name: Name of the argument.
        array: Array to check.
        channels: Channels that the model takes.
        why: Continuation of the sentence that says so.
    """
    if array.shape[1] != channels:
        raise ValueError(
            f"{name} has {array.shape[1]} channels and the model takes {channels}{why}."
        )
    if 0 in array.shape:
        raise ValueError(f"{name} is empty: its shape is {list(array.shape)}.")


def check_features(name: str, array: Array, features: int, encoder: str) -> None:
    """Raise ValueError unless [..., features] has the features of the model's encoder.

    Args:
        name: Name of the argument.
        array: Array to check.
        features: Features that the model takes.
        encoder: Kind of the encoder that made the array, such as "text encoder".
    """
    if array.shape[-1] != features:
        raise ValueError(
            f"{name} has {array.shape[-1]} features and the model takes {features}: it belongs to "
            f"another {encoder}."
        )


def check_shapes(expected: Mapping[str, tuple[Array | None, tuple[int, ...]]]) -> None:
    """Raise ValueError unless every array that is given has its shape.

    Args:
        expected: Array (None if it was not given) and shape of each argument, by name.
    """
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} is {list(array.shape)} and must be {list(shape)}.")

"""Videos in any form that users give them, as arrays of frames."""

from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float32, Shaped, UInt8

from svg_jax.media.pixels import as_numpy, channels_last, in_known_range, rgb_of_pillow

Frames = UInt8[np.ndarray, "frames height width 3"] | Float32[np.ndarray, "frames height width 3"]
# An array of any library, a list of arrays or of Pillow images, or a pipeline's output.
AnyVideo = Any


def as_frames(video: AnyVideo, name: str = "video") -> Frames:
    """Turn a video in any form into an array of bytes, or of float32 from 0 to 1.

    Args:
        video: Output of a pipeline; array of NumPy, JAX or PyTorch [frames, height, width, 3] or
            [frames, 3, height, width] (the former if both fit), alone or in a batch of one; or list
            of frames, as arrays or Pillow images. The dtype decides the range: integers are from 0
            to 255, floating point is from 0 to 1.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If it is not exactly one video, has no pixels, or has values outside the range.
    """
    return in_known_range(stacked_frames(video, name), name)


def stacked_frames(video: AnyVideo, name: str) -> Shaped[np.ndarray, "frames height width 3"]:
    """Turn a video in any form into an array of its own dtype and range.

    Args:
        video: See `as_frames`.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If it is not exactly one video, or has no pixels.
    """
    frames = getattr(video, "frames", video)  # of a pipeline's output
    if frames is None and video is not None:
        raise ValueError(f"{name}: this output has latents only: there are no frames")
    array = _stack(frames, name) if isinstance(frames, list | tuple) else as_numpy(frames, name)
    if array.ndim == 0 or isinstance(frames, PIL.Image.Image):  # a path or a generator, say
        raise ValueError(
            f"{name} must be an array or a list of frames: got one {type(frames).__name__}"
        )
    if array.ndim == 5:
        if len(array) != 1:
            raise ValueError(f"{name} must be one video: pick one of these {len(array)}")
        array = array[0]
    if array.ndim != 4:
        raise ValueError(
            f"{name} must have the axes [frames, height, width, 3]: got the shape {array.shape}"
        )
    return channels_last(array, name)


def _stack(frames: list[Any] | tuple[Any, ...], name: str) -> np.ndarray:
    if not frames:
        raise ValueError(f"{name} has no frames")
    if _is_list_of_frames(frames[0]):
        if len(frames) == 1:
            return _stack(frames[0], name)
        raise ValueError(f"{name} must be one video: pick one of these {len(frames)}")
    arrays = [
        np.asarray(rgb_of_pillow(frame, name))
        if isinstance(frame, PIL.Image.Image)
        else as_numpy(frame, name)
        for frame in frames
    ]
    first = arrays[0]
    for index, array in enumerate(arrays):
        if (array.shape, array.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{name}: frame {index} is {array.dtype}{list(array.shape)}, and the first one "
                f"{first.dtype}{list(first.shape)}"
            )
    return np.stack(arrays)


def _is_list_of_frames(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return isinstance(value[0], PIL.Image.Image) or getattr(value[0], "ndim", 0) == 3

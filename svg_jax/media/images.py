"""Images as the models' inputs: frames of a video, and the pixels of a CLIP image encoder.

Pillow resizes all of them, as in diffusers' VideoProcessor and transformers' PIL backend of
CLIPImageProcessor: resizing on a device differs from it by one or two grey levels.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float, Float32, UInt8

from svg_jax.convert.formats.json_file import read_json
from svg_jax.media.image_files import open_image
from svg_jax.media.pixels import as_numpy, channels_last, in_known_range, rgb_of_pillow
from svg_jax.models.config import read_config

# A Pillow image in three colours, or an array: uint8, or floating point from 0 to 1.
Image = (
    PIL.Image.Image
    | UInt8[np.ndarray, "_height _width 3"]
    | Float32[np.ndarray, "_height _width 3"]
)
# Anything that `as_image` takes, or a list with one for each prompt.
AnyImage = Any

_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
_MOST_RESIZED = 2**26  # pixels
_LANCZOS = PIL.Image.Resampling.LANCZOS


def as_image(image: AnyImage, name: str = "image") -> Image:
    """Turn an image in any form into a Pillow image, or an array of bytes or of float32.

    Args:
        image: Path of a file, which is turned as its camera was (others are not, as in diffusers);
            Pillow image of any mode; or array of NumPy, JAX or PyTorch [height, width, 3] or
            [3, height, width] (the former if both fit), alone or in a batch of one, or of greys
            [height, width]. The dtype decides the range: integers are from 0 to 255, floating point
            is from 0 to 1.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If it is no image, has no pixels, or has values outside the range.
        OSError: If a file does not exist or cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    if isinstance(image, PIL.Image.Image):
        return rgb_of_pillow(image, name)
    array = as_numpy(image, name)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise ValueError(
            f"{name} must be a path, an image, or an array [height, width, 3]: got "
            f"{type(image).__name__} of the shape {array.shape}"
        )
    return in_known_range(channels_last(array, name), name)


def as_images(images: AnyImage, name: str = "image") -> list[Image]:
    """Turn one image, or a list or a batch with one for each prompt, into a list of images.

    Args:
        images: One image in any form of `as_image`, a list of these, or an array of several images.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If one is no image, or there is none.
        OSError: If a file does not exist or cannot be read.
    """
    if not isinstance(images, list | tuple):
        if getattr(images, "ndim", 0) != 4:
            return [as_image(images, name)]
        images = as_numpy(images, name)
    if len(images) == 0:
        raise ValueError(f"{name} is empty: pass one for all prompts, or one for each")
    if any(isinstance(image, list | tuple) for image in images):
        raise ValueError(f"{name} must be images, or one: got a list of lists")
    if len(images) == 1:
        return [as_image(images[0], name)]
    return [as_image(image, f"{name} {index}") for index, image in enumerate(images)]


def images_of_each(images: AnyImage, prompts: int, name: str = "image") -> list[Image]:
    """Turn images into a list of one for all prompts, or one for each; see `as_images`.

    Raises:
        ValueError: If the number of images is neither one nor that of the prompts.
    """
    images = as_images(images, name)
    if len(images) not in (1, prompts):
        raise ValueError(
            f"{name} must be one or as many as the prompts: got {len(images)} for {prompts}"
        )
    return images


def with_images_read(arguments: Mapping[str, Any], prompts: int | None = None) -> dict[str, Any]:
    """Read the images among a call's arguments, once for all uses.

    Args:
        arguments: Arguments of a call by name, of which `image` and `last_image` are read.
        prompts: Number of prompts, if it is known.

    Returns:
        The arguments with a list in place of each image: one for all prompts, or one for each.

    Raises:
        ValueError: If one is no image, or there are too many or too few; names argument or file.
        OSError: If a file does not exist or cannot be read.
    """
    read = {}
    for name in ("image", "last_image"):
        images = arguments.get(name)
        if images is not None:
            images = as_images(images, name)
            read[name] = images if prompts is None else images_of_each(images, prompts, name)
    return {**arguments, **read}


def as_frame(image: AnyImage, height: int, width: int) -> Float[np.ndarray, "3 height width"]:
    """Turn an image into a frame of a video; resizing does not keep its proportions.

    Arrays in floating point are rounded to 8 bits if they must be resized.

    Returns:
        Pixels from −1 to 1.

    Raises:
        ValueError: If it is no image.
    """
    image = as_image(image)
    if isinstance(image, np.ndarray) and image.shape[:2] == (height, width):
        pixels = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
    else:
        resized = _as_pillow(image).resize((width, height), _LANCZOS)
        pixels = np.asarray(resized, np.float32) / 255
    return np.moveaxis(2 * pixels - 1, -1, 0)


@dataclass(frozen=True)
class CLIPImageProcessor:
    """The values of a preprocessor_config.json, with transformers' names and defaults.

    Attributes:
        size: Pixels of the shorter side after resizing.
        crop_size: Rows and columns of the part that is cut out of the middle.
        resample: Pillow's number of the filter; 3 is bicubic.
        rescale_factor: Factor of pixels from 0 to 255.
        image_mean: Mean of each colour, which is subtracted.
        image_std: Standard deviation of each colour, by which it is divided.
    """

    size: int = 224
    crop_size: int = 224
    resample: int = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if not 1 <= self.crop_size <= self.size:
            raise ValueError(
                f"CLIPImageProcessor: crop_size={self.crop_size} must be from 1 to the size of "
                f"{self.size} that images are resized to."
            )
        if self.resample not in list(PIL.Image.Resampling):
            raise ValueError(f"CLIPImageProcessor: resample={self.resample} is no filter.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPImageProcessor":
        """Read a parsed preprocessor_config.json.

        Raises:
            ValueError: If it contains anything that is not implemented.
        """
        values = dict(values)
        for key in ("image_processor_type", "feature_extractor_type"):
            if values.pop(key, _PROCESSORS[0]) not in _PROCESSORS:
                raise ValueError(f"CLIPImageProcessor: this is the file of another {key}.")
        values |= {
            key: _side(key, values[key], names)
            for key, names in (("size", {"shortest_edge"}), ("crop_size", {"height", "width"}))
            if key in values
        }
        # transformers 5 also writes arguments that were not given.
        values = {key: value for key, value in values.items() if value is not None}
        only: dict[str, Any] = dict.fromkeys(_STEPS, True)
        return read_config(cls, values, ignored={"processor_class"}, only=only)

    def __call__(self, image: AnyImage) -> Float[np.ndarray, "3 size size"]:
        """Turn an image into the encoder's input.

        Raises:
            ValueError: If it is no image, or so narrow that resizing would make it huge.
        """
        pillow = _as_pillow(as_image(image))
        short, long = sorted(pillow.size)
        longer = int(self.size * long / short)
        if self.size * longer > _MOST_RESIZED:
            raise ValueError(
                f"image of {pillow.width} x {pillow.height} pixels is too narrow for CLIP, which "
                f"resizes its shorter side to {self.size}"
            )
        upright = pillow.width <= pillow.height
        width, height = (self.size, longer) if upright else (longer, self.size)
        pixels = np.asarray(pillow.resize((width, height), self.resample))
        top, left = (height - self.crop_size) // 2, (width - self.crop_size) // 2
        pixels = pixels[top : top + self.crop_size, left : left + self.crop_size]
        scaled = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(x, np.float32) for x in (self.image_mean, self.image_std))
        return np.moveaxis((scaled - mean) / std, -1, 0)


def load_image_processor(folder: str | Path) -> CLIPImageProcessor:
    """Read the folder of a CLIP image processor.

    Raises:
        ValueError: If its file is missing or damaged, or contains anything not implemented.
    """
    file = Path(folder) / "preprocessor_config.json"
    try:
        return CLIPImageProcessor.from_dict(read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _side(key: str, value: Any, names: set[str]) -> Any:
    """Read the one number of a square size, in its older and its newer form."""
    if not isinstance(value, dict):
        return value
    sides = {side for side in value.values() if side is not None}
    given = {name for name, side in value.items() if side is not None}
    if given != names or len(sides) != 1:
        raise ValueError(f"CLIPImageProcessor: {key}={value!r} is not implemented.")
    return sides.pop()


def _as_pillow(image: Image) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image
    if image.dtype != np.uint8:
        image = (image * 255).round().astype(np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(image))

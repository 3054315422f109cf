"""Images as the models see them: as frames of a video, and as a CLIP image encoder's input.

Resizing is Pillow's throughout, as in diffusers' VideoProcessor and transformers' PIL backend of
CLIPImageProcessor: resizing on a device differs from it by one or two grey levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, UInt8

from svg_jax.convert.json_file import read_json
from svg_jax.models.config import read_config

# Pillow's, or an array: uint8, or floating point from 0 to 1.
Image = (
    PIL.Image.Image | UInt8[np.ndarray, "_height _width 3"] | Float[np.ndarray, "_height _width 3"]
)

_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
_LANCZOS = PIL.Image.Resampling.LANCZOS


def open_image(path: str | Path) -> PIL.Image.Image:
    """Reads an image file, turned as its camera was.

    Raises:
        ValueError: If it is no image, or one whose greys have no known range.
        OSError: If it cannot be read.
    """
    try:
        with PIL.Image.open(path) as image:
            return _as_rgb(PIL.ImageOps.exif_transpose(image))
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image") from error


def images_of_each(image: Image | Sequence[Image], prompts: int) -> list[Image]:
    """The image of each prompt, or one for all of them; ValueError on another number."""
    images = [image] if isinstance(image, PIL.Image.Image | np.ndarray) else list(image)
    if len(images) not in (1, prompts):
        raise ValueError(
            f"the images must be one or as many as the prompts: got {len(images)} for {prompts}"
        )
    return images


def as_frame(image: Image, height: int, width: int) -> Float[np.ndarray, "3 height width"]:
    """An image as a frame of a video: resized without regard to its proportions, from −1 to 1.

    Arrays in floating point are rounded to 8 bits where they have to be resized.

    Raises:
        ValueError: On an array that is no image.
    """
    if isinstance(image, np.ndarray) and image.shape[:2] == (height, width):
        pixels = image
        if image.dtype == np.uint8:
            pixels = image.astype(np.float32) / 255
        _check_range(pixels)
    else:
        resized = _as_pillow(image).resize((width, height), _LANCZOS)
        pixels = np.asarray(resized, np.float32) / 255
    return np.moveaxis(2 * pixels.astype(np.float32) - 1, -1, 0)


@dataclass(frozen=True)
class CLIPImageProcessor:
    """What a preprocessor_config.json says; transformers' names and defaults.

    Attributes:
        size: Pixels of the shorter side after resizing.
        crop_size: Rows and columns of what is cut out of the middle.
        resample: Pillow's number of the filter; 3 is bicubic.
        rescale_factor: Multiplies pixels from 0 to 255.
        image_mean: Of each colour.
        image_std: Of each colour.
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
        """Reads a parsed preprocessor_config.json; ValueError on what is not implemented."""
        values = dict(values)
        for key in ("image_processor_type", "feature_extractor_type"):
            if values.pop(key, _PROCESSORS[0]) not in _PROCESSORS:
                raise ValueError(f"CLIPImageProcessor: this is the file of another {key}.")
        values |= {
            key: _side(key, values[key], names)
            for key, names in (("size", {"shortest_edge"}), ("crop_size", {"height", "width"}))
            if key in values
        }
        # transformers 5 writes the arguments that were not given, too.
        values = {key: value for key, value in values.items() if value is not None}
        only: dict[str, Any] = dict.fromkeys(_STEPS, True)
        return read_config(cls, values, ignored={"processor_class"}, only=only)

    def __call__(self, image: Image) -> Float[np.ndarray, "3 size size"]:
        """An image as the encoder takes it.

        Raises:
            ValueError: On an array that is no image.
        """
        pillow = _as_pillow(image)
        short, long = sorted(pillow.size)
        longer = int(self.size * long / short)
        upright = pillow.width <= pillow.height
        width, height = (self.size, longer) if upright else (longer, self.size)
        pixels = np.asarray(pillow.resize((width, height), self.resample))
        top, left = (height - self.crop_size) // 2, (width - self.crop_size) // 2
        pixels = pixels[top : top + self.crop_size, left : left + self.crop_size]
        scaled = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(x, np.float32) for x in (self.image_mean, self.image_std))
        return np.moveaxis((scaled - mean) / std, -1, 0)


def load_image_processor(folder: str | Path) -> CLIPImageProcessor:
    """Reads the folder of a CLIP image processor.

    Raises:
        ValueError: If its file is missing, damaged, or says what is not implemented.
    """
    file = Path(folder) / "preprocessor_config.json"
    try:
        return CLIPImageProcessor.from_dict(read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _side(key: str, value: Any, names: set[str]) -> Any:
    """The one number that a size stands for, in its older and its newer form."""
    if not isinstance(value, dict):
        return value
    sides = {side for side in value.values() if side is not None}
    given = {name for name, side in value.items() if side is not None}
    if given != names or len(sides) != 1:
        raise ValueError(f"CLIPImageProcessor: {key}={value!r} is not implemented.")
    return sides.pop()


def _as_pillow(image: Image) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return _as_rgb(image)
    if image.dtype != np.uint8:
        _check_range(image)
        image = (image * 255).round().astype(np.uint8)
    return PIL.Image.fromarray(image)


def _as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Three colours of 8 bits; transparency is dropped, as by diffusers' `load_image`."""
    if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255
        greys = np.asarray(image) / 257
        image = PIL.Image.fromarray(greys.round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode} has no known range: save it with 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # or Pillow warns
    return image.convert("RGB")


def _check_range(pixels: np.ndarray) -> None:
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
        raise ValueError(
            "an image in floating point has values from 0 to 1: got "
            f"{pixels.min():.3g} to {pixels.max():.3g}"
        )

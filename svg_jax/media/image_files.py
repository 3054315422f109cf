"""Untrusted image files: only some formats are opened, up to usual sizes."""

import errno
import os
import warnings
from pathlib import Path

import PIL.features
import PIL.Image
import PIL.ImageOps

from svg_jax.convert.files import open_regular
from svg_jax.convert.formats.show import show
from svg_jax.media.pixels import rgb_of_pillow

# The formats of cameras, browsers and painting programs. Pillow knows others that start programs
# (EPS) or open further files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_SEVERAL = {"MPO"}  # a JPEG whose further pictures are previews or another eye's


def open_image(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """Read an image file, and turn the image as its camera was turned.

    Args:
        path: Regular file of one picture: PNG, JPEG, WebP, BMP, GIF, TIFF, or AVIF where Pillow can
            read it.

    Returns:
        The image in three colours of 8 bits.

    Raises:
        ValueError: If it is no such file, damaged, animated or too large, or its greys have no
            known range.
        OSError: If it does not exist or cannot be read.
    """
    path = Path(path)
    if path.parts and path.parts[0] in ("http:", "https:"):
        raise FileNotFoundError(errno.ENOENT, "is an address: download the image first", str(path))
    known = [name for name in FORMATS if name != "AVIF" or PIL.features.check("avif")]
    with open_regular(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged tags, which change nothing
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            with PIL.Image.open(file, formats=known) as image:
                if getattr(image, "is_animated", False) and image.format not in _SEVERAL:
                    raise ValueError("it has several pictures: save the one that is meant")
                image.load()
                return rgb_of_pillow(PIL.ImageOps.exif_transpose(image), "the image")
        except PIL.UnidentifiedImageError as error:
            what = f"is no image ({', '.join(known)})" if path.stat().st_size else "is empty"
            raise ValueError(f"{path} {what}") from error
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
            most = PIL.Image.MAX_IMAGE_PIXELS or 0
            raise ValueError(f"{path} has over {most:,} pixels: make it smaller") from error
        except Exception as error:  # damaged files raise other kinds in each format
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            reason = show(text.removeprefix("the image: "), 200)
            raise ValueError(f"{path} cannot be read as an image: {reason}") from error

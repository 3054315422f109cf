"""Prepare what the tiny model's training videos are made of: six photographs and ten digits.

    python examples/make_tiny_assets.py            # writes examples/tiny_assets.npz

The photographs come out of the installed wheels of scikit-image and scikit-learn, the digits are
DejaVu Sans Bold, which matplotlib carries; nothing is downloaded. The result is committed, so only
someone who wants other material needs those packages. The licences are named in the model card,
svg_jax/assets/tiny_cogvideox/README.md.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PHOTO_SIZE = (96, 64)  # width, height
SPRITE_SIZE = 24
SUPERSAMPLING = 10
GLYPH_HEIGHT = 18.5  # of the sprite's 24 pixels: the rest is room for the outline
DEJAVU_DIGIT_HEIGHT = 0.729  # of the font size

# In the order of tiny_data.PLACES. The part is left, top and width in shares of the photograph: the
# pagoda stands at the left of its own, and half of the crops would show trees.
PHOTOGRAPHS = (
    ("sklearn", "datasets/images/flower.jpg", (0.0, 0.0, 1.0)),
    ("sklearn", "datasets/images/china.jpg", (0.0, 0.03, 0.85)),
    ("skimage", "data/chelsea.png", (0.0, 0.0, 1.0)),
    ("skimage", "data/coffee.png", (0.0, 0.0, 1.0)),
    ("skimage", "data/rocket.jpg", (0.0, 0.0, 1.0)),
    ("skimage", "data/hubble_deep_field.jpg", (0.0, 0.1, 1.0)),
)


def package_file(package: str, path: str) -> Path:
    """Find a data file inside an installed package."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is needed for {path}: pip install {package}")
    return Path(spec.origin).parent / path


def photograph(package: str, path: str, part: tuple[float, float, float]) -> np.ndarray:
    """One photograph, a 3:2 part of it, reduced: uint8 [64, 96, 3]."""
    image = Image.open(package_file(package, path)).convert("RGB")
    left, top, width = part[0] * image.width, part[1] * image.height, part[2] * image.width
    bottom = min(top + width * PHOTO_SIZE[1] / PHOTO_SIZE[0], image.height)
    box = (left, top, left + width, bottom)
    return np.asarray(image.resize(PHOTO_SIZE, Image.Resampling.LANCZOS, box=box))


def sprite(digit: int) -> np.ndarray:
    """Coverage of one digit and of its soft outline: uint8 [24, 24, 2]."""
    font = ImageFont.truetype(
        str(package_file("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf")),
        GLYPH_HEIGHT * SUPERSAMPLING / DEJAVU_DIGIT_HEIGHT,
    )
    side = SPRITE_SIZE * SUPERSAMPLING
    glyph = Image.new("L", (side, side))
    left, top, right, bottom = font.getbbox(str(digit))
    corner = ((side - right - left) / 2, (side - bottom - top) / 2)
    ImageDraw.Draw(glyph).text(corner, str(digit), fill=255, font=font)
    outline = glyph.filter(ImageFilter.MaxFilter(2 * SUPERSAMPLING + 1))
    outline = outline.filter(ImageFilter.GaussianBlur(0.9 * SUPERSAMPLING))
    small = (SPRITE_SIZE, SPRITE_SIZE)
    layers = [layer.resize(small, Image.Resampling.BOX) for layer in (glyph, outline)]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def make_assets() -> dict[str, np.ndarray]:
    """Photographs uint8 [6, 64, 96, 3] and sprites uint8 [10, 24, 24, 2]."""
    return {
        "photographs": np.stack([photograph(*where) for where in PHOTOGRAPHS]),
        "sprites": np.stack([sprite(digit) for digit in range(10)]),
    }


if __name__ == "__main__":
    destination = Path(__file__).with_name("tiny_assets.npz")
    np.savez_compressed(destination, **make_assets())  # pyright: ignore
    print(f"{destination}: {destination.stat().st_size} bytes")

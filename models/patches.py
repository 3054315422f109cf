"""Latents to tokens and back."""

from jaxtyping import Array, Float


def token_grid(
    num_frames: int, height: int, width: int, patch: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Count the frames, rows and columns of tokens.

    Args:
        num_frames: Latent frames.
        height: Latent rows.
        width: Latent columns.
        patch: Latent frames, rows and columns of a token.

    Raises:
        ValueError: On a size that is not a positive multiple of the patch's.
    """
    sizes = {"num_frames": num_frames, "height": height, "width": width}
    for (name, size), step in zip(sizes.items(), patch, strict=True):
        if size < 1 or size % step:
            raise ValueError(f"latent {name}={size} must be a positive multiple of {step}.")
    return num_frames // patch[0], height // patch[1], width // patch[2]


def patchify(
    latents: Float[Array, "batch channels frames height width"], patch: tuple[int, int, int]
) -> Float[Array, "batch tokens features"]:
    """Cut latents into tokens in the order frame, row, column.

    A token's features are in the order channel, frame, row, column.
    """
    batch, channels, frames, height, width = latents.shape
    pt, ph, pw = patch
    x = latents.reshape(batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw)
    x = x.transpose(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(batch, -1, channels * pt * ph * pw)


def unpatchify(
    tokens: Float[Array, "batch tokens features"],
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    *,
    channels_last: bool = False,
) -> Float[Array, "batch channels frames height width"]:
    """Invert `patchify`.

    Args:
        tokens: Tokens.
        grid: Frames, rows and columns of tokens.
        patch: Latent frames, rows and columns of a token.
        channels_last: Whether features are in the order frame, row, column, channel.
    """
    batch, (frames, rows, columns), (pt, ph, pw) = len(tokens), grid, patch
    if channels_last:
        x = tokens.reshape(batch, frames, rows, columns, pt, ph, pw, -1)
        x = x.transpose(0, 7, 1, 4, 2, 5, 3, 6)
    else:
        x = tokens.reshape(batch, frames, rows, columns, -1, pt, ph, pw)
        x = x.transpose(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(batch, -1, frames * pt, rows * ph, columns * pw)

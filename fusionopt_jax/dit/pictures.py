"""Sampled images as files: a grid of pictures, or the numbers themselves."""

import os
import pathlib

import numpy as np
from jaxtyping import Array, Float, UInt8


def save_images(
    path: str | os.PathLike[str],
    images: Float[Array | np.ndarray, "batch height width channels"],
    *,
    columns: int | None = None,
    enlarge: int = 4,
) -> str:
    """Write images to a `.png` grid, or as they are to `.npy`.

    One or three channels are taken for pixels in [-1, 1]. Any other number is taken for
    latents, which only their autoencoder can turn into pictures: the grid then shows
    the first three channels, each stretched to its own range, to tell whether there is
    structure.

    Args:
        path: File ending in ".png" (needs Pillow, in the extra `dit`) or ".npy".
        images: [batch, height, width, channels].
        columns: Of the grid, filled column by column; None is one row.
        enlarge: How many pixels a side each pixel becomes in a `.png`.

    Returns:
        A sentence that says what was written.

    Raises:
        ValueError: If the ending is another one, or the values are not finite.
        ImportError: If Pillow is needed and not installed.
        OSError: If there is no such folder, or it can't be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_images(pathlib.Path(folder) / "a.npy", np.zeros((2, 4, 4, 4)))
        '2 latents of shape 4x4x4, no pictures'
    """
    path = pathlib.Path(path)
    check_target(path)
    values = np.asarray(images, np.float32)
    if not np.isfinite(values).all():
        raise ValueError(
            "`images` has NaN or infinite values, so nothing was written; sample in "
            "fp32, with less guidance, or check the weights."
        )
    latent = values.shape[-1] not in (1, 3)
    kind = ("latent" if latent else "image") + ("s" if len(values) > 1 else "")
    shape = "x".join(str(size) for size in values.shape[1:])
    said = f"{len(values)} {kind} of shape {shape}"
    if path.suffix == ".npy":
        np.save(path, values)
        return said + (", no pictures" if latent else "")
    from PIL import Image

    grid = picture_grid(values, columns or len(values))
    Image.fromarray(grid.repeat(enlarge, axis=0).repeat(enlarge, axis=1)).save(path)
    if latent:
        said += ": the first three channels, stretched, which are no pixels"
    return said


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse a file that `save_images` could not write, before there is an image.

    Args:
        path: The file that will be written.

    Raises:
        ValueError: If the ending is neither ".png" nor ".npy".
        ImportError: If Pillow is needed and not installed.
        OSError: If there is no such folder, or it can't be written to.

    Example:
        >>> check_target("grid.jpg")
        Traceback (most recent call last):
        ...
        ValueError: images are written to .png or .npy files, not to grid.jpg.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".png", ".npy"):
        raise ValueError(f"images are written to .png or .npy files, not to {path}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"the folder of {path} does not exist; make it first: mkdir -p "
            f"{path.parent}"
        )
    # A file that is there is replaced in place, which needs no right to its folder.
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} can't be written; check who may write there.")
    if path.suffix == ".png":
        try:
            import PIL.Image
        except ImportError as error:
            raise ImportError(
                "writing a .png needs Pillow, which is not installed; install the "
                'extra `dit`: pip install "fusionopt-jax[dit]", or write a .npy.'
            ) from error
        del PIL


def picture_grid(
    images: Float[np.ndarray, "batch height width channels"], columns: int
) -> UInt8[np.ndarray, "rows_height columns_width 3"]:
    """Images in a grid, filled column by column, as RGB bytes.

    Args:
        images: Pixels in [-1, 1] of one or three channels, or latents of any other
            number, of which the first three channels are stretched to their range.
        columns: Number of columns.

    Returns:
        Bytes, [rows * (height + 1) - 1, columns * (width + 1) - 1, 3]. A line one pixel
        wide lies between the images.

    Example:
        >>> picture_grid(np.ones((4, 8, 8, 1), np.float32), columns=2).shape
        (17, 17, 3)
    """
    channels = images.shape[-1]
    if channels in (1, 3):
        shown = np.broadcast_to(images, (*images.shape[:-1], 3))
        shown = np.clip((shown + 1.0) / 2.0, 0.0, 1.0)
    else:
        shown = images[..., :3] if channels > 3 else images[..., [0, 1, 1]]
        low, high = np.percentile(shown, [2, 98], axis=(0, 1, 2))
        shown = np.clip((shown - low) / np.maximum(high - low, 1e-6), 0.0, 1.0)
    count, height, width, _ = shown.shape
    rows = -(-count // columns)
    grid = np.ones((rows * (height + 1), columns * (width + 1), 3))
    for index, image in enumerate(shown):
        column, row = divmod(index, rows)
        top, left = row * (height + 1), column * (width + 1)
        grid[top : top + height, left : left + width] = image
    return np.rint(255.0 * grid[:-1, :-1]).astype(np.uint8)

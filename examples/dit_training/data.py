"""Labelled images: the bundled digits, a folder of classes, or an `.npz` file."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_training.errors import RunError

HELD_OUT = 400
"""How many images validate (a fifth of a set too small for that)."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Dataset(NamedTuple):
    """Images in [-1, 1] (or their latents), channels last, split once and for all.

    Attributes:
        train_images: `[N, H, W, C]`, float32.
        train_labels: `[N]`, int32, from 0.
        held_out_images: `[M, H, W, C]`, float32; never trained on.
        held_out_labels: `[M]`, int32.
        class_names: one name per label.
        digest: a hash of pixels and labels, to recognise the data on resume.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray
    class_names: tuple[str, ...]
    digest: str


def load(source: str, *, keep_bytes: bool = False) -> Dataset:
    """Read `"digits"`, a folder with one subfolder per class, or an `.npz` file.

    With `keep_bytes`, images of bytes stay bytes, a quarter of the memory.
    """
    path = Path(source)
    if source == "digits":
        images, labels, names = read_digits()
    elif path.is_dir():
        images, labels, names = read_folder(path)
    elif path.suffix == ".npz" and path.is_file():
        images, labels, names = read_npz(path)
    else:
        raise RunError(
            f"--data {source}: no such folder or .npz file; give a folder with one "
            "subfolder of images per class, an .npz file with `images` and `labels`, "
            "or `digits`"
        )
    if not (keep_bytes and images.dtype == np.uint8):
        images = to_unit_range(images, source)
    return split(images, labels, names, source)


def read_digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = tuple(str(name) for name in digits.target_names)
    return digits.images[..., None], digits.target.astype(np.int32), names


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images of one size; a class is a subfolder, numbered in alphabetical order."""
    from PIL import Image, UnidentifiedImageError

    try:
        classes = sorted(
            entry
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        files = [
            (path, label)
            for label, entry in enumerate(classes)
            for path in sorted(entry.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
    except OSError as error:
        raise RunError(
            f"--data {folder}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    if not files:
        raise RunError(
            f"--data {folder}: no images in it; put them into one subfolder per class "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    per_class = Counter(label for _, label in files)
    for label, entry in enumerate(classes):
        if not per_class[label]:
            raise RunError(
                f"--data {folder}: class folder {entry.name!r} holds no images; fill "
                "it or remove it"
            )

    pictures: list[np.ndarray] = []
    for path, _ in files:
        try:
            with Image.open(path) as picture:
                grey = picture.mode in ("1", "L", "LA")
                pictures.append(np.asarray(picture.convert("L" if grey else "RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise RunError(
                f"--data {folder}: {path} cannot be read as an image; replace or "
                "remove it"
            ) from error
        if pictures[-1].shape[:2] != pictures[0].shape[:2]:
            raise RunError(
                f"--data {folder}: images of mixed sizes, {files[0][0]} has "
                f"{size_text(pictures[0])} pixels and {path} has "
                f"{size_text(pictures[-1])}; resize them all to one size"
            )
    if any(picture.ndim == 3 for picture in pictures):
        pictures = [
            picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)
            for picture in pictures
        ]
    images = np.stack(pictures)
    images = images if images.ndim == 4 else images[..., None]
    labels = np.asarray([label for _, label in files], np.int32)
    return images, labels, tuple(entry.name for entry in classes)


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """`images` `[N, H, W]` or `[N, H, W, C]`, `labels` `[N]` from 0 without gaps."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise RunError(
            f"--data {path}: cannot be read as an .npz file ({error}); write it with "
            "numpy.savez(path, images=..., labels=...)"
        ) from error
    missing = [name for name in ("images", "labels") if name not in found]
    if missing:
        raise RunError(
            f"--data {path}: no array `{missing[0]}` in it (it has "
            f"{', '.join(sorted(found)) or 'none'}); write it with "
            "numpy.savez(path, images=..., labels=...)"
        )
    images, labels = found["images"], found["labels"]
    if images.ndim not in (3, 4) or images.dtype.kind not in "uif":
        raise RunError(
            f"--data {path}: `images` must be numbers of shape [N, H, W] or "
            f"[N, H, W, C], got {images.dtype} of shape {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "ui":
        raise RunError(
            f"--data {path}: `labels` must be one integer per image, got "
            f"{labels.dtype} of shape {list(labels.shape)} for {len(images)} images"
        )
    if not len(images):
        raise RunError(f"--data {path}: no images in it; `images` has shape [0, ...]")
    present = np.unique(labels)
    classes = int(present[-1]) + 1
    if present[0] < 0:
        raise RunError(
            f"--data {path}: labels out of range, found {present[0]}; number the "
            "classes from 0"
        )
    if len(present) != classes:
        absent = next(label for label in range(classes) if label not in present)
        raise RunError(
            f"--data {path}: labels out of range, the largest is {classes - 1} but no "
            f"image has label {absent}; number the classes from 0 without gaps"
        )
    images = images if images.ndim == 4 else images[..., None]
    return images, labels.astype(np.int32), tuple(str(name) for name in range(classes))


def to_unit_range(images: np.ndarray, source: str) -> np.ndarray:
    """Pixels in [-1, 1]: bytes as 0..255, other numbers by their own extremes."""
    if images.dtype == np.uint8:
        return bytes_to_unit_range(images)
    low, high = float(images.min()), float(images.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise RunError(
            f"--data {source}: `images` holds NaN or infinite pixels; remove those "
            "images"
        )
    if low == high:
        raise RunError(f"--data {source}: every pixel of `images` is {low}")
    return ((images - low) * (2 / (high - low)) - 1).astype(np.float32)


def bytes_to_unit_range(images: np.ndarray) -> np.ndarray:
    """Bytes as numbers in [-1, 1]; other numbers as they are."""
    if images.dtype != np.uint8:
        return images
    return images.astype(np.float32) / 127.5 - 1


def split(
    images: np.ndarray, labels: np.ndarray, names: tuple[str, ...], source: str
) -> Dataset:
    """Hold out the same images whatever the run's seed, every class in proportion."""
    from sklearn.model_selection import train_test_split

    count, classes = len(images), len(names)
    if images.shape[1] != images.shape[2]:
        raise RunError(
            f"--data {source}: images of {size_text(images[0])} pixels are not square; "
            "crop or pad them"
        )
    if classes < 2:
        raise RunError(
            f"--data {source}: only one class ({names[0]!r}); give at least two"
        )
    held_out = HELD_OUT if count >= 4 * HELD_OUT else max(count // 5, classes)
    if min(Counter(labels.tolist()).values()) < 2 or count - held_out < classes:
        raise RunError(
            f"--data {source}: {count} images are too few for {classes} classes; give "
            "at least 2 images per class"
        )
    train, rest = train_test_split(
        np.arange(count), test_size=held_out, random_state=0, stratify=labels
    )
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    return Dataset(
        images[train], labels[train], images[rest], labels[rest], names, digest
    )


def size_text(image: np.ndarray) -> str:
    """Width and height as people write them."""
    return f"{image.shape[1]}x{image.shape[0]}"

"""Characters drawn from the fonts that come with matplotlib, one font family held out.

Every image is a function of the font, the character and a variant number, so that two
machines with the same fonts draw the same set.
"""

import hashlib
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from dit_training.data import Dataset
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SIDE = 16
"""Pixels of an image's side, unless another is asked for."""

TRAIN_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *("cmr10", "cmb10", "cmtt10", "cmti10"),
)
HELD_OUT_FONTS = (
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    "cmss10",
)
"""A family none of whose styles is trained on, and a style of another family."""

TRAIN_VARIANTS, HELD_OUT_VARIANTS = 8, 3

_FINE = 4
"""Each image is drawn so many times larger and averaged down."""


@lru_cache
def load(side: int = SIDE) -> Dataset:
    """All images in [-1, 1], `[N, side, side, 1]`, and which character each shows."""
    train_images, train_labels = _draw_all(TRAIN_FONTS, TRAIN_VARIANTS, side)
    held_out_images, held_out_labels = _draw_all(
        HELD_OUT_FONTS, HELD_OUT_VARIANTS, side
    )
    digest = hashlib.sha256()
    for part in (train_images, train_labels, held_out_images, held_out_labels):
        digest.update(part.tobytes())
    return Dataset(
        train_images,
        train_labels,
        held_out_images,
        held_out_labels,
        tuple(CHARACTERS),
        digest.hexdigest()[:16],
    )


def draw(font: str, character: str, variant: int, side: int = SIDE) -> np.ndarray:
    """One character, uint8 `[side, side]`; size, place and slant vary by `variant`."""
    seed = [CHARACTERS.index(character), variant, *font.encode()]
    rng = np.random.default_rng(seed)
    side = _FINE * side
    size = round(side * rng.uniform(0.72, 0.9))
    angle, slant = rng.uniform(-0.12, 0.12, 2)
    shift = rng.uniform(-0.06, 0.06, 2) * side

    canvas = Image.new("L", (side, side))
    place = (side / 2, 0.74 * side)
    ImageDraw.Draw(canvas).text(
        place, character, fill=255, font=_font(font, size), anchor="ms"
    )
    # The transform says where each pixel comes from, around the middle.
    cos, sin = np.cos(angle), np.sin(angle)
    back = np.array([[cos, sin + slant], [-sin, cos]])
    start = side / 2 - back @ (side / 2 + shift)
    coefficients = (*back[0], start[0], *back[1], start[1])
    moved = canvas.transform(
        canvas.size,
        Image.Transform.AFFINE,
        tuple(float(number) for number in coefficients),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(moved.reduce(_FINE))


def _draw_all(
    fonts: tuple[str, ...], variants: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    pictures, labels = [], []
    for font in fonts:
        for label, character in enumerate(CHARACTERS):
            for variant in range(variants):
                pictures.append(draw(font, character, variant, side))
                labels.append(label)
    images = np.stack(pictures)[..., None].astype(np.float32) / 127.5 - 1
    return images, np.array(labels, np.int32)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # The plain layout engine is in every build of Pillow.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)

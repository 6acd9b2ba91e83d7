"""Grids and strips of images, as PNG files.

Every function writes one PNG of about 1,000 pixels' width. Images are uint8 (..., H, W, C) with C 1 or 3; small ones
are enlarged without smoothing so that every pixel can be seen.

Shapes: R rows, H W size of an image, C its channels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..data.pixels import visible

Array = NDArray[Any]


WIDTH = 1040  # pixels, of every picture


MAX_BYTES = 300_000


INK, MUTED, FAINT = "#1f2430", "#6b7280", "#d9dde3"


def sample_grid(images: Array, row_names: Sequence[str], path: Path) -> None:
    """Write a grid, a row a class with the class names at the left.

    Args:
        images: uint8 (R, columns, H, W, C), some samples of each of R classes.
        row_names: R names; empty ones leave no margin (an unconditional model).
        path: the PNG to write.

    Raises:
        ValueError: images are not such an array, or the names do not match its rows.
    """
    _check_images("images", images, 5)
    if len(row_names) != len(images):
        raise ValueError(f"row_names has {len(row_names)} names for {len(images)} rows; give one a row.")
    _image_table(images, [shorten(name) for name in row_names], None, path)


def film_strip(
    x_t: Array, x0: Array, timesteps: Sequence[float], path: Path, *, names: Sequence[str] | None = None, most: int = 12
) -> None:
    """Write, for a few samples, the noisy x_t above the predicted x_0 over the sampling steps.

    Args:
        x_t: uint8 (n, steps, H, W, C), the noisy images.
        x0: uint8 (n, steps, H, W, C), what the model then expects the clean image to be.
        timesteps: the t of each step on the 0..1000 scale, written above the columns.
        path: the PNG to write.
        names: of the n samples, to go before "noisy".
        most: at most this many steps are drawn, evenly chosen with the first and the last.

    Raises:
        ValueError: the arrays, timesteps and names do not agree.
    """
    _check_images("x_t", x_t, 5)
    _check_images("x0", x0, 5)
    names = [""] * len(x_t) if names is None else names
    if x_t.shape != x0.shape or (len(x_t), len(timesteps)) != (len(names), x_t.shape[1]):
        raise ValueError(
            f"x_t {x_t.shape}, x0 {x0.shape}, {len(timesteps)} timesteps and {len(names)} names do not match;"
            " give (n, steps, H, W, C) twice, one t a step and one name a sample"
        )
    chosen = spread(len(timesteps), most)
    rows = np.stack([x_t[:, chosen], x0[:, chosen]], axis=1).reshape(-1, len(chosen), *x_t.shape[2:])
    heads = [("t = " if k == 0 else "") + f"{timesteps[i]:.0f}" for k, i in enumerate(chosen)]
    labels = [text for name in names for text in (f"{shorten(name)}  noisy xₜ".strip(), "predicted x₀")]
    _image_table(rows, labels, heads, path, group=2)


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices of range(count), evenly spaced, with the first and the last."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def _image_table(images: Array, names: Sequence[str], heads: Sequence[str] | None, path: Path, group: int = 1) -> None:
    """Images (R, columns, H, W, C) as a table with row names, column heads and a wider gap every `group` rows."""
    num_rows, num_columns, height, width, _ = images.shape
    font, gap, pad = _font(17), 5, 14
    left = pad + max(int(font.getlength(name)) for name in names)
    left += pad if left > pad else 0
    top = pad + (28 if heads else 0)
    room = max(24, min(96, (WIDTH - left - pad) // num_columns - gap))
    scale = max(1, room // max(height, width))
    cell_w, cell_h = width * scale, height * scale
    if cell_w > room:  # larger than its cell: shrink, keeping the shape
        cell_w, cell_h = room, max(1, round(height * room / width))
    extra = 12 if group > 1 else 0
    canvas_w = left + num_columns * (cell_w + gap) - gap + pad
    canvas_h = top + num_rows * (cell_h + gap) - gap + (num_rows // group - 1) * extra + pad
    canvas = Image.new("RGB", (canvas_w, canvas_h), "white")
    draw = ImageDraw.Draw(canvas)
    for k, head in enumerate(heads or ()):
        x = left + k * (cell_w + gap) + cell_w // 2
        draw.text((x, top - 9), head, fill=MUTED, font=_font(15), anchor="ms")
    for r in range(num_rows):
        y = top + r * (cell_h + gap) + (r // group) * extra
        draw.text((left - pad, y + cell_h // 2), names[r], fill=INK, font=font, anchor="rm")
        for k in range(num_columns):
            shown = _to_pil(images[r, k]).resize(
                (cell_w, cell_h),
                Image.Resampling.NEAREST if cell_w >= width else Image.Resampling.BOX,
            )
            canvas.paste(shown, (left + k * (cell_w + gap), y))
    _save(canvas, path)


def _check_images(name: str, images: Array, ndim: int) -> None:
    if images.ndim != ndim or images.dtype != np.uint8 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{name} has shape {images.shape} and type {images.dtype}; give uint8 with {ndim} axes ending in H, W, C"
            " with C 1 or 3."
        )


def shorten(name: str, most: int = 22) -> str:
    """The name, cut with an ellipsis after `most` characters; what cannot be printed becomes a question mark."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= most else name[: most - 1] + "…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    from matplotlib import get_data_path

    return ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _to_pil(image: Array) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _save(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; one that would be larger than MAX_BYTES is reduced to 256 colours."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > MAX_BYTES:
        buffer = io.BytesIO()
        image.quantize(256).save(buffer, "PNG", optimize=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def write_grid(images: NDArray[np.uint8], labels: Sequence[int] | None, id2label: dict[int, str], path: Path) -> None:
    """One picture: a row a class (rows of eight without labels)."""
    keys = [i // 8 for i in range(len(images))] if labels is None else list(labels)
    images = visible(images)
    rows = [images[[i for i, key in enumerate(keys) if key == row]] for row in sorted(set(keys))]
    width = max(len(row) for row in rows)
    blank = np.full_like(images[:1], 255)
    full = np.stack([np.concatenate([row, np.repeat(blank, width - len(row), axis=0)]) for row in rows])
    names = ["" if labels is None else id2label.get(row, str(row)) for row in sorted(set(keys))]
    sample_grid(full, names, path)

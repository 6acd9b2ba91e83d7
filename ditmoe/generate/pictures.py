"""Grids and strips of images: PNG files of about 1,000 pixels' width.

Images are uint8 (..., H, W, C) with C 1 or 3; small ones are enlarged without smoothing, so that all pixels show.

Shapes: R rows, H W size of an image, C its channels.
"""

import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..data.pixels import to_pil, visible
from ..files import whole

Array = NDArray[Any]

WIDTH = 1040  # pixels, of every picture
MAX_BYTES = 300_000
INK, MUTED, FAINT = "#1f2430", "#6b7280", "#d9dde3"


def write_grid(
    images: Array, labels: Sequence[int] | None, id2label: Mapping[int, str], path: Path, *,
    columns: int = 8, most_rows: int | None = None,
) -> None:  # fmt: skip
    """Write a grid, a row a class with the class names at the left.

    Args:
        images: uint8 (N, H, W, C); of more than 3 channels (latents) the first are shown.
        labels: N; None of a model without labels: rows of `columns`, without names.
        id2label: names of the classes that have one.
        path: the PNG to write.
        columns: see `labels` and `most_rows`.
        most_rows: so many evenly chosen rows at most, of `columns` images at most and of the same length; None: all
            images, the shorter rows filled up with white.
    """
    images = visible(images)
    keys = [i // columns for i in range(len(images))] if labels is None else labels
    present = sorted(set(keys))
    chosen = present if most_rows is None else [present[k] for k in spread(len(present), most_rows)]
    rows = [[i for i, key in enumerate(keys) if key == row] for row in chosen]
    if most_rows is not None:
        if len(rows) > 1 and len(rows[-1]) < len(rows[0]) and labels is None:
            rows = rows[:-1]
        shortest = min(columns, *map(len, rows))
        rows = [row[:shortest] for row in rows]
    table = np.full((len(rows), max(map(len, rows)), *images.shape[1:]), 255, images.dtype)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = images[row]
    names = [shorten(id2label.get(key, str(key))) if labels is not None else "" for key in chosen[: len(rows)]]
    _image_table(table, names, None, path)


def film_strip(
    x_t: Array, x0: Array, timesteps: Sequence[float], path: Path, *, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write, for a few samples, the noisy x_t above the predicted x_0 over the sampling steps; where what is.

    Args:
        x_t: uint8 (n, steps, H, W, C), the noisy images.
        x0: uint8 (n, steps, H, W, C), what the model then expects the clean image to be.
        timesteps: the t of each step on the 0..1000 scale, written above the columns.
        path: the PNG to write.
        names: of the n samples, to go before "noisy".

    At most 12 steps are drawn, evenly chosen with the first and the last. What comes back are JSON values: the left
    edges `x` of the columns and their `times`, the upper edges `y` of the rows and their names `rows`, the `size`
    (width, height) of a picture.
    Raises ValueError where the arrays, timesteps and names do not agree.
    """
    names = [""] * len(x_t) if names is None else names
    if x_t.shape != x0.shape or (len(x_t), len(timesteps)) != (len(names), x_t.shape[1]):
        given = f"x_t {x_t.shape}, x0 {x0.shape}, {len(timesteps)} timesteps and {len(names)} names"
        fix = "give (n, steps, H, W, C) twice, one t a step and one name a sample"
        raise ValueError(f"{given} do not match; {fix}")
    chosen = spread(len(timesteps), 12)
    rows = np.stack([x_t[:, chosen], x0[:, chosen]], axis=1).reshape(-1, len(chosen), *x_t.shape[2:])
    heads = [("t = " if k == 0 else "") + f"{timesteps[i]:.0f}" for k, i in enumerate(chosen)]
    labels = [text for name in names for text in (f"{shorten(name)}  noisy xₜ".strip(), "predicted x₀")]
    places = _image_table(rows, labels, heads, path, group=2)
    return {**places, "times": [round(float(timesteps[i]), 1) for i in chosen], "rows": labels}


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices of range(count), evenly spaced, with the first and the last."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def _image_table(
    images: Array, names: Sequence[str], heads: Sequence[str] | None, path: Path, group: int = 1
) -> dict[str, Any]:
    """Images (R, columns, H, W, C) as a table with row names, column heads and a wider gap every `group` rows."""
    if images.ndim != 5 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images {images.shape} of {images.dtype} are not uint8 (R, columns, H, W, C) with C 1 or 3")
    num_rows, num_columns, height, width, _ = images.shape
    font, gap, pad = _font(17), 5, 14
    widest = max(int(font.getlength(name)) for name in names)
    left = pad + (widest + pad if widest else 0)
    top = pad + (28 if heads else 0)
    room = max(24, min(96, (WIDTH - left - pad) // num_columns - gap))
    cell_w, cell_h = (side * max(1, room // max(height, width)) for side in (width, height))
    if cell_w > room:  # larger than its cell: shrink, keeping the shape
        cell_w, cell_h = room, max(1, round(height * room / width))
    how = Image.Resampling.NEAREST if cell_w >= width else Image.Resampling.BOX
    xs = [left + k * (cell_w + gap) for k in range(num_columns)]
    ys = [top + r * (cell_h + gap) + (r // group if group > 1 else 0) * 12 for r in range(num_rows)]
    canvas = Image.new("RGB", (xs[-1] + cell_w + pad, ys[-1] + cell_h + pad), "white")
    draw = ImageDraw.Draw(canvas)
    for x, head in zip(xs, heads or (), strict=False):
        draw.text((x + cell_w // 2, top - 9), head, fill=MUTED, font=_font(15), anchor="ms")
    for row, name, y in zip(images, names, ys, strict=True):
        draw.text((left - pad, y + cell_h // 2), name, fill=INK, font=font, anchor="rm")
        for image, x in zip(row, xs, strict=True):
            canvas.paste(to_pil(image).resize((cell_w, cell_h), how), (x, y))
    save_png(canvas, path)
    return {"x": xs, "y": ys, "size": [cell_w, cell_h]}


def shorten(name: str) -> str:
    """The name, cut with an ellipsis to 22 characters; what cannot be printed becomes a question mark."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= 22 else name[:21] + "…"


def load_matplotlib() -> None:
    """Import matplotlib, whatever MPLBACKEND says: that of a notebook need not be installed, and ours draw without.

    To be called before anything of it is imported.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        os.environ.update({} if backend is None else {"MPLBACKEND": backend})
    if backend:
        with suppress(ValueError):  # what its import would do
            matplotlib.rcParams["backend"] = backend


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    load_matplotlib()
    from matplotlib import get_data_path

    return ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; one that would be larger than MAX_BYTES is reduced to 256 colours."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > MAX_BYTES:
        buffer = io.BytesIO()
        image.quantize(256).save(buffer, "PNG", optimize=True)
    with whole(path) as file:
        file.write(buffer.getvalue())

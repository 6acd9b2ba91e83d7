"""The loss curves of a run, and what its charts share. All use matplotlib's object API, never pyplot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..generate.pictures import FAINT, INK, MUTED, WIDTH, Array, load_matplotlib, save_png

LINE, SECOND = "#2b6cb0", "#c2571a"
FLOOR = 2.0**-9  # ratios below this are drawn alike
SMALL_PANELS = {  # in this order beside the loss, as far as a run has them
    "vlb": "variational bound", "balance": "balance loss (1 = even)", "contrastive": "routing contrastive loss",
    "load_max_over_mean": "busiest expert ÷ mean load", "z": "router z-loss", "grad_norm": "gradient norm",
    "lr": "learning rate", "images_per_second": "images per second",
}  # fmt: skip


def loss_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the loss over the steps (raw faint, smoothed on top) beside small panels of its parts.

    The smooth line is a centred moving average over 1/30 of the rows, so it does not lag. Small panels are drawn
    for the keys of `SMALL_PANELS` that the rows have; lists (one value a layer) show their largest.

    Args:
        rows: the lines of `metrics.jsonl`, each with "step" and "loss".
        path: the PNG to write.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows is empty; train for at least one logged step before drawing the loss.")
    series = {key: _series(rows, key) for key in ("loss", "mse", *SMALL_PANELS)}
    small = [key for key in SMALL_PANELS if len(series[key][0]) and np.ptp(series[key][1])][:6]
    columns = 1 if len(small) <= 3 else 2
    deep = max(1, -(-len(small) // columns))
    fig = figure(3.6 if deep < 3 else 4.4)
    grid = fig.add_gridspec(deep, 2 + columns if small else 1)
    main = fig.add_subplot(grid[:, :2])
    loss, mse = (smooth(series[key][1], len(rows) // 30 | 1) for key in ("loss", "mse"))
    has_parts = len(mse) == len(loss) and not np.allclose(mse, loss, rtol=0.01)
    if has_parts:
        _draw_series(main, *series["mse"], colour=SECOND, label="squared error alone", raw=False)
    _draw_series(main, *series["loss"], colour=LINE, label="loss: all weighted parts")
    _log_if_wide(main, loss)
    if has_parts:
        main.legend(frameon=False, fontsize=9, labelcolor=INK, reverse=True)
    title(main, "Training loss")
    main.set_xlabel("optimiser step", color=MUTED, fontsize=9)
    for k, key in enumerate(small):
        ax = fig.add_subplot(grid[k // columns, 2 + k % columns])
        _draw_series(ax, *series[key], colour=MUTED, exact=key == "lr")
        title(ax, SMALL_PANELS[key], size=9)
    save_figure(fig, path)


def smooth(values: Array, window: int) -> Array:
    """Centred moving average of `window` values (fewer at the ends); values that are not finite do not count."""
    good = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        average: Array = (total[high] - total[low]) / (count[high] - count[low])
    return average


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Array, Array]:
    """(steps, values) of the rows that have the key; of a list, its largest."""
    pairs = [(row["step"], row[key]) for row in rows if np.size(row.get(key, [])) and row[key] is not None]
    steps = np.array([step for step, _ in pairs], dtype=float)
    return steps, np.array([np.max(value) for _, value in pairs], dtype=float)


def _draw_series(
    ax: Any, steps: Array, values: Array, *, colour: str, label: str = "", raw: bool = True, exact: bool = False
) -> None:
    """One line: raw values faint, the moving average on top (or the values, if exact); dots when there are few."""
    from matplotlib.ticker import MaxNLocator

    few = len(values) < 30
    line = values if exact else smooth(values, len(values) // 30 | 1)
    if raw and not few and not exact:
        ax.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        inside = np.concatenate([line, np.nanquantile(values, [0.005, 0.995])])  # the rare spikes may leave the frame
        low, high = np.nanmin(inside), np.nanmax(inside)
        edge = 0.05 * (high - low)
        ax.set_ylim((0.9 * low if 0 < low <= edge else low - edge), high + edge)
    ax.plot(steps, line, color=colour, linewidth=1.7, label=label, marker="o" if few else "", markersize=3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(_short)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    bare_axes(ax)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)


def _log_if_wide(ax: Any, line: Array) -> None:
    """A log axis with plain numbers when the line spans more than a factor of 4."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = line[np.isfinite(line)]
    if len(shown) and ax.get_ylim()[0] > 0 and shown.max() > 4 * shown.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(_short)
        ax.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float, _position: Any = None) -> str:
    """A tick's number: 20000 as 20k, 1500000 as 1.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.5g}"


def figure(height: float) -> Any:
    """A matplotlib figure of `WIDTH` pixels, so many inches high, that makes room for what is written in it."""
    load_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 100, height), dpi=100, layout="constrained")


def title(ax: Any, text: str, size: int = 11) -> None:
    """A title at the left, bold from size 11."""
    weight = "bold" if size > 10 else "normal"
    ax.set_title(text, loc="left", fontsize=size, color=INK, fontweight=weight, parse_math=False)  # names may have $


def bare_axes(ax: Any) -> None:
    """Only what is read: no box, no tick marks, muted numbers."""
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(length=0, labelsize=8, labelcolor=MUTED, which="both")


def octaves(*ratios: Array) -> float:
    """Half the colour range of ratios in octaves: 1, 2 or 3, the first that holds 98 % of all values."""
    values = np.concatenate([ratio[np.isfinite(ratio)] for ratio in ratios])
    if not len(values):
        return 1.0
    return float(np.clip(np.ceil(np.quantile(np.abs(np.log2(np.maximum(values, FLOOR))), 0.98)), 1, 3))


def show_ratios(ax: Any, ratios: Array, limit: float, aspect: str = "equal") -> Any:
    """Ratios as log2 colours, white at 1, without smoothing and without a frame; the drawn image."""
    colours = np.log2(np.maximum(ratios, FLOOR))
    drawn = ax.imshow(colours, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect=aspect, interpolation="nearest")
    bare_axes(ax)
    ax.spines[:].set_visible(False)
    return drawn


def ratio_ticks(bar: Any, limit: float, one: str) -> None:
    """A colour bar of `show_ratios` with ticks as fractions and multiples of `one`, the name of 1."""
    names = ("⅛×", "¼×", "½×", one, "2×", "4×", "8×")[3 - int(limit) : 4 + int(limit)]
    bar.set_ticks(np.arange(-limit, limit + 1), labels=names, fontsize=9, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def save_figure(fig: Any, path: Path) -> None:
    """Draw a matplotlib figure into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)

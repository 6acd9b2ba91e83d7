"""Which expert serves what: a model's routing by layer, time step, class and position, drawn.

Shapes: L layers with experts, B time bins, Y classes, T tokens of an image, E experts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.routing import relative_load
from ..generate.pictures import FAINT, INK, MUTED, WIDTH, Array, shorten, spread
from .charts import FLOOR, figure, octaves, ratio_ticks, save_figure, show_ratios, title

MARGIN = 0.9  # inches that labels take from the width of the picture


def expert_maps(
    counts: Array, path: Path, *, class_names: Sequence[str], timesteps: Sequence[float], grid: tuple[int, int],
    layer_names: Sequence[str],
) -> None:  # fmt: skip
    """Write four maps of which expert serves what: by layer, time step, class and position.

    A colour is a share of assignments divided by the even share 1/E, on a log scale centred at 1 (even load). Where
    layers times experts are too many to tell apart, the last three maps show evenly chosen layers and say so.

    Args:
        counts: integers (L, B, Y, T, E), assignments of tokens to experts; tokens in row-major order.
        path: the PNG to write.
        class_names: Y names.
        timesteps: B centres of the time bins, on the 0..1000 scale.
        grid: rows and columns of tokens in an image, T = rows * columns.
        layer_names: L names of the layers that hold experts.

    Raises:
        ValueError: there is no such layer, or the names do not match the counts.
    """
    expected = (len(layer_names), len(timesteps), len(class_names), grid[0] * grid[1])
    if counts.ndim != 5 or counts.shape[:4] != expected or 0 in counts.shape:
        raise ValueError(f"counts has shape {counts.shape}; its names and grid say {expected} and then experts")
    E = counts.shape[-1]
    layers, limit, loads = _loads(counts)
    names, wide = [layer_names[i] for i in layers], len(layers) * E > 40
    by_layer = loads["load"][:, None]
    by_time, by_class = (loads[name].swapaxes(0, 1) for name in ("time", "class"))
    panel = WIDTH / 100 / (1 if wide else 2) - MARGIN
    few = 4 if len(layers) * -(-E // 4) * panel / 4 <= 4.5 else 8  # small maps on a line of half a page, by its height
    maps, corners = _tile(loads["place"].reshape(len(layers), *grid, E), 32 if wide else few)
    heights = [0.26 * max(3, len(rows)) for rows in (by_layer, by_time, by_class)]
    fig, axes = _four_panels([*heights, panel * maps.shape[0] / maps.shape[1]], wide)
    of = "" if len(layers) == len(layer_names) else f", {len(layers)} of {len(layer_names)} layers"
    _matrix(axes[0], by_layer, layer_names, [""], limit, "Layer × expert")
    _matrix(axes[1], by_time, [f"{t:.0f}" for t in timesteps], names, limit, f"Time step × expert{of}")
    axes[1].set_ylabel("t  (0 clean, 1000 noise)", color=MUTED, fontsize=9)
    _matrix(axes[2], by_class, class_names, names, limit, f"Class × expert{of}")
    _positions(axes[3], maps, corners, grid, names, limit, f"Position in the image × expert{of}")
    _load_bar(fig, axes, limit)
    save_figure(fig, path)


def expert_loads(
    counts: Array, *, class_names: Sequence[str], timesteps: Sequence[float], grid: tuple[int, int],
    layer_names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What a page shows of one expert, JSON values: by layer and expert the share of assignments over the even share.

    Of `expert_maps`' layers, `load` is (L, E), `time` (L, E, B), `class` (L, E, Y), `place` (L, E, T); the arguments
    are its own. Where nothing was counted there is 0. `octaves` is half the colour range of `expert_maps`.
    """
    layers, limit, loads = _loads(counts)
    loads["load"] = loads["load"][layers]
    return {
        "octaves": limit,
        **{name: np.nan_to_num(np.moveaxis(load, -1, 1)).round(2).tolist() for name, load in loads.items()},
        "layers": [layer_names[i] for i in layers], "classes": [*class_names], "times": [*timesteps], "grid": [*grid],
    }  # fmt: skip


def _loads(counts: Array) -> tuple[list[int], float, dict[str, Array]]:
    """Shown layers, half the colour range, loads: of all layers (L, E), of those shown (layers, B or Y or T, E)."""
    layers = spread(len(counts), max(2, 128 // counts.shape[-1]))
    loads = {"load": relative_load(counts.sum(axis=(1, 2, 3)))}
    for name, axes in (("time", (2, 3)), ("class", (1, 3)), ("place", (1, 2))):
        loads[name] = relative_load(counts[layers].sum(axis=axes))
    return layers, octaves(*loads.values()), loads


def _four_panels(heights: Sequence[float], wide: bool) -> tuple[Any, list[Any]]:
    """A figure and four axes of these heights in inches: one above the other when wide, else two by two."""
    rows = heights if wide else [max(heights[:2]), max(heights[2:])]
    fig = figure(sum(rows) + 0.62 * len(rows) + 0.7)
    fig.get_layout_engine().set(h_pad=0.1, w_pad=0.1, hspace=0.03, wspace=0.03)
    return fig, list(fig.subplots(len(rows), 4 // len(rows), height_ratios=rows).flat)


def _matrix(ax: Any, loads: Array, rows: Sequence[str], groups: Sequence[str], limit: float, heading: str) -> None:
    """Loads (rows, groups, E) as one matrix, a blank column between groups; figures in the cells when they fit."""
    num_rows, num_groups, E = loads.shape
    gap = max(1, E // 16)
    padded = np.pad(loads, ((0, 0), (0, 0), (0, gap)), constant_values=np.nan).reshape(num_rows, -1)[:, :-gap]
    show_ratios(ax, padded, limit, "auto")
    ax.set_yticks(range(num_rows), [shorten(name) for name in rows], fontsize=9, color=INK, parse_math=False)
    if num_groups > 1 or groups[0]:
        centres = [g * (E + gap) + (E - 1) / 2 for g in range(num_groups)]
        ax.set_xticks(centres, groups, fontsize=9, color=INK)
        ax.set_xlabel(f"experts 0 to {E - 1} of each layer", color=MUTED, fontsize=9)
    else:
        ticks = range(0, E, max(1, E // 16))
        ax.set_xticks(ticks, [str(e) for e in ticks])
        ax.set_xlabel("expert", color=MUTED, fontsize=9)
        for (r, e), load in np.ndenumerate(loads[:, 0] if E <= 8 else loads[:0, 0]):
            pale = abs(np.log2(max(load, FLOOR))) < 0.6 * limit
            ax.text(e, r, f"{load:.2f}", ha="center", va="center", fontsize=8, color=INK if pale else "white")
    title(ax, heading)


def _tile(loads: Array, per_line: int) -> tuple[Array, list[list[tuple[int, int]]]]:
    """Loads (L, h, w, E) as one canvas of small maps, and the (row, column) of every map's corner by layer, expert.

    A layer's maps stand side by side, on several lines if they must; layers share a line while they fit.
    """
    L, height, width, E = loads.shape
    across = min(E, per_line)
    lines, side = -(-E // across), min(L, per_line // across)
    gap, head = max(1, width // 5), max(2, round(0.55 * height))
    block_h, block_w = head + lines * (height + gap), across * (width + gap) + gap
    canvas = np.full((block_h * -(-L // side), block_w * side - 2 * gap), np.nan)
    corners = []
    for layer in range(L):
        top, left = layer // side * block_h + head, layer % side * block_w
        corners.append([(top + e // across * (height + gap), left + e % across * (width + gap)) for e in range(E)])
        for e, (y, x) in enumerate(corners[-1]):
            canvas[y : y + height, x : x + width] = loads[layer, :, :, e]
    return canvas, corners


def _positions(
    ax: Any, maps: Array, corners: Sequence[Sequence[tuple[int, int]]], grid: tuple[int, int], names: Sequence[str],
    limit: float, heading: str,
) -> None:  # fmt: skip
    """The canvas of `_tile` with a frame around every map and the layer's name above its first."""
    from matplotlib.patches import Rectangle

    show_ratios(ax, maps, limit, "equal")
    for name, layer in zip(names, corners, strict=True):
        ax.text(layer[0][1] - 0.5, layer[0][0] - 0.5 - 0.1 * grid[0], name, fontsize=9, color=INK, va="bottom")
        for y, x in layer:
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), grid[1], grid[0], fill=False, edgecolor=FAINT, linewidth=0.7))
    ax.set(xticks=[], yticks=[], anchor="NW")
    ax.set_xlabel(f"experts 0 to {len(corners[0]) - 1} in reading order", color=MUTED, fontsize=9)
    title(ax, heading)


def _load_bar(fig: Any, axes: list[Any], limit: float) -> None:
    """The colour bar all panels share, with ticks as fractions and multiples of the even load."""
    bar = fig.colorbar(
        axes[0].images[0], ax=axes, location="bottom", shrink=0.4, aspect=40, extend="both", panchor=False
    )
    ratio_ticks(bar, limit, "even load")

"""What experts specialise in, drawn: what their choice depends on, how even it is, when, and which go together.

Shapes: B time bins, E experts, L layers with experts.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.findings import CONDITIONS, Row
from ..generate.pictures import FAINT, INK, MUTED, spread
from .charts import LINE, SECOND, bare_axes, figure, octaves, ratio_ticks, save_figure, show_ratios, title

SHOWN_LAYERS = 5  # evenly chosen ones
SHOWN_PAIRS = 2
COLOURS = dict(zip(CONDITIONS, (LINE, SECOND, MUTED), strict=True))


def draw_choices(runs: Sequence[Sequence[Row]], path: Path, *, timesteps: Sequence[float]) -> None:
    """Write four panels of the rows (`findings.layer_row`) of one run or of several with the same layers.

    Values of the runs are dots, their mean is a bar or a line; evenly chosen layers stand for many. Which experts are
    chosen together is the first run's, and left out where a token has one.

    Args:
        runs: rows of the L layers of each run.
        path: the PNG to write.
        timesteps: B centres of the time bins, on the 0..1000 scale.
    """
    some = spread(len(runs[0]), SHOWN_LAYERS)
    shown = [[run[i] for i in some] for run in runs]
    has_pairs = bool(np.isfinite(runs[0][0]["lift"]).any())
    fig = figure(8.2)
    fig.get_layout_engine().set(h_pad=0.12, w_pad=0.12, hspace=0.04, wspace=0.03)
    grid = fig.add_gridspec(2, 2)
    of = "" if len(some) == len(runs[0]) else f", {len(some)} of {len(runs[0])} layers"
    _dependence(fig.add_subplot(grid[0, 0]), shown, f"What the choice depends on{of}")
    _evenness(fig.add_subplot(grid[0, 1]), shown, f"How even the experts are{of}")
    below = fig.add_subplot(grid[1, 0] if has_pairs else grid[1, :])
    _over_time(below, shown, timesteps, f"Evenness over the noise{of}")
    if has_pairs:
        _pairs(fig, grid[1, 1], runs[0])
    save_figure(fig, path)


def _dependence(ax: Any, runs: Sequence[Sequence[Row]], heading: str) -> None:
    """Three bars a layer: per cent of the choice that place, time and class explain."""
    for k, key in enumerate(CONDITIONS):
        values = np.array([[100 * row[key] / row["choice"] if row["choice"] else math.nan for row in r] for r in runs])
        at, mean = np.arange(values.shape[1]) + 0.27 * (k - 1), values.mean(axis=0)
        ax.bar(at, mean, 0.24, color=COLOURS[key], label=key, alpha=0.85)
        if len(runs) > 1:
            ax.plot(np.tile(at, len(runs)), values.ravel(), "o", color=INK, markersize=3)
        for x, y, top in zip(at, mean, np.maximum(values.max(axis=0), 0), strict=True):
            if math.isfinite(y):
                text = f"{round(y, 1) + 0.0:.1f}" if abs(y) < 9.95 else f"{y:.0f}"  # and no -0.0
                ax.annotate(text, (x, top), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=INK)
    ax.set_xticks(range(len(runs[0])), [row["layer"] for row in runs[0]])
    ax.set_ylabel("% of the choice explained, beyond chance", color=MUTED, fontsize=9)
    ax.set_ylim(min(0, ax.get_ylim()[0]), 1.1 * ax.get_ylim()[1])
    _finish(ax, heading, columns=3)


def _evenness(ax: Any, runs: Sequence[Sequence[Row]], heading: str) -> None:
    """Every expert a dot: its load, and what it adds to the output, over the even share."""
    kinds = (("load", LINE, -0.15, "load"), ("contribution", SECOND, 0.15, "part of the routed output"))
    for key, colour, shift, label in kinds:
        values = [np.concatenate([run[i][key] for run in runs]) for i in range(len(runs[0]))]
        jitter = np.linspace(-0.08, 0.08, len(values[0]))
        for i, value in enumerate(values):
            ax.plot(i + shift + jitter, value, "o", color=colour, markersize=4, alpha=0.6, label=label * (i == 0))
    ax.axhline(1, color=MUTED, linewidth=0.8)
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    even = [np.mean([run[i]["load_entropy"] for run in runs]) for i in range(len(runs[0]))]
    ax.set_xticks(range(len(even)), [f"{row['layer']}\n{x:.3f}" for row, x in zip(runs[0], even, strict=True)])
    ax.set_xlim(-0.6, len(even) - 0.4)
    ax.set_xlabel("entropy of the load, 1 where it is even", color=MUTED, fontsize=9)
    ax.set_ylabel("of an expert, over the even share", color=MUTED, fontsize=9)
    _finish(ax, heading, columns=2)


def _over_time(ax: Any, runs: Sequence[Sequence[Row]], timesteps: Sequence[float], heading: str) -> None:
    """A line a layer: the entropy of the choice, and dashed that where place and class are known."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    L, handles = len(runs[0]), []
    for i, row in enumerate(runs[0]):
        colour = colormaps["viridis"](0.85 * i / max(1, L - 1))
        for key, dashes in (("entropy_by_time", "-"), ("given", "--")):
            values = np.array([run[i][key] for run in runs])
            width = 1.5 + 2 * (L - 1 - i) / L  # lines that coincide are all seen
            ax.plot(timesteps, values.mean(axis=0), dashes, color=colour, linewidth=width)
            for value in values if len(runs) > 1 else ():
                ax.plot(timesteps, value, dashes, color=colour, linewidth=0.7, alpha=0.35)
        handles.append(Line2D([], [], color=colour, label=row["layer"]))
    if any(np.isfinite(row["given"]).any() for row in runs[0]):
        handles.append(Line2D([], [], color=MUTED, linestyle="--", label="place and class known"))
    most = math.log2(len(runs[0][0]["load"]))
    least = np.nanmin([row[key] for run in runs for row in run for key in ("entropy_by_time", "given")])
    edge = 0.06 * max(most - least, 0.5)
    ax.set_ylim(least - edge, most + edge)
    ax.axhline(most, color=MUTED, linewidth=0.8)
    ax.set_xlim(1000, 0)
    ax.set_xlabel("t, from noise to image", color=MUTED, fontsize=9)
    ax.set_ylabel("entropy of the choice, bits (line: even)", color=MUTED, fontsize=9)
    _finish(ax, heading, columns=min(4, len(handles)), handles=handles)


def _pairs(fig: Any, place: Any, rows: Sequence[Row]) -> None:
    """Matrices of lift, experts by experts, of a few layers, under one heading."""
    chosen = [rows[i] for i in spread(len(rows), SHOWN_PAIRS)]
    inner = place.subgridspec(2, len(chosen), height_ratios=[20, 1])
    limit, E = octaves(*(row["lift"] for row in chosen)), len(chosen[0]["lift"])
    for k, row in enumerate(chosen):
        ax = fig.add_subplot(inner[0, k])
        drawn = show_ratios(ax, row["lift"], limit)
        ax.set_anchor("N")
        ticks = range(0, E, max(1, E // 8))
        ax.set_xticks(ticks, [str(e) for e in ticks])
        ax.set_yticks(ticks if k == 0 else [], [str(e) for e in ticks] if k == 0 else [])
        ax.set_xlabel(row["layer"], color=INK, fontsize=9)
        if k == 0:
            title(ax, "Experts that are chosen together")
    bar = fig.colorbar(drawn, cax=fig.add_subplot(inner[1, :]), orientation="horizontal", extend="both")
    ratio_ticks(bar, limit, "chance")


def _finish(ax: Any, heading: str, *, columns: int, handles: Sequence[Any] | None = None) -> None:
    """Heading, faint lines, a legend below the axes."""
    bare_axes(ax)
    ax.tick_params(axis="x", labelcolor=INK)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    title(ax, heading)
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=columns, frameon=False, fontsize=9,
        labelcolor=INK, handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip

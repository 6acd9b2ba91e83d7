"""The tables and the plot of docs/samplers.md, from the rows of `benchmarks.samplers`.

    python -m benchmarks.samplers_page samplers.jsonl ... --plot docs/pictures/samplers.png

A cell is the mean over seeds, and the largest distance of a seed from it where there are several.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ditmoe.generate.pictures import load_matplotlib
from samplers.time_shift import window_of

Row = dict[str, Any]
OWN = {"exposure_mode": "both", "exposure_variance": "published", "exposure_cutoff": 100}
COLOURS = {
    "ddpm": "#888888", "ddim": "#1f77b4", "pndm": "#2ca02c", "dpm++2m": "#d62728", "unipc": "#9467bd",
    "ts-ddpm": "#888888", "ts-ddim": "#1f77b4", "ts-pndm": "#2ca02c", "flow-euler": "#8c564b",
    "flow-heun": "#e377c2", "flow-sde": "#bcbd22",
}  # fmt: skip


def cell(rows: Iterable[Row]) -> str:
    values = [row["fd"] for row in rows]
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" + (f" ±{max(abs(v - mean) for v in values):.3f}" if len(values) > 1 else "")


def mean(rows: list[Row]) -> float:
    return float(sum(row["fd"] for row in rows) / len(rows))


def nfe_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    lines = ["| network calls | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for nfe in sorted({row["nfe"] for row in rows}):
        cells = [[r for r in rows if r["nfe"] == nfe and r["sampler"] == name] for name in names]
        best = min(mean(found) for found in cells if found)
        text = [f"**{cell(found)}**" if found and mean(found) == best else cell(found) for found in cells]
        lines.append(f"| {nfe} | " + " | ".join(text) + " |")
    return "\n".join(lines)


def shift_table(rows: list[Row]) -> str:
    """Rows: steps, mode, criterion, cutoff; columns: windows."""
    keys = ("exposure_mode", "exposure_variance", "exposure_cutoff")
    windows = sorted({row["sampler_options"]["exposure_window"] for row in rows})
    lines = ["| steps | mode | criterion | cutoff | " + " | ".join(f"w = {w}" for w in windows) + " |"]
    lines.append("|---" * (len(windows) + 4) + "|")
    groups = dict.fromkeys((row["steps"], *(row["sampler_options"][k] for k in keys)) for row in rows)
    for group in sorted(groups, key=lambda g: (g[0], g[1] != "both", g[1], g[2], g[3])):
        mine = [r for r in rows if (r["steps"], *(r["sampler_options"][k] for k in keys)) == group]
        cells = [cell(r for r in mine if r["sampler_options"]["exposure_window"] == w) for w in windows]
        lines.append(f"| {' | '.join(map(str, group))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def window_table(nfe: list[Row], tried: list[Row]) -> str:
    """Mode both, published, cutoff 100: the base, the window that follows the calls, and the others tried."""
    rows = [r for r in tried if OWN.items() <= r["sampler_options"].items()]
    lines = ["| sampler | calls | without | 4 T / N^2 | with it | other windows |", "|---" * 6 + "|"]
    for name in ("ts-ddim", "ts-ddpm", "ts-pndm"):
        for calls in sorted({r["nfe"] for r in nfe if r["sampler"] == name}):
            at = [r for r in nfe if r["nfe"] == calls]
            own = window_of(calls, 1000)
            mine = [r for r in rows if r["sampler"] == name and r["nfe"] == calls]
            windows = sorted({r["sampler_options"]["exposure_window"] for r in mine} - {own})
            others = [f"{w}: {cell(r for r in mine if r['sampler_options']['exposure_window'] == w)}" for w in windows]
            base = cell(r for r in at if r["sampler"] == name.removeprefix("ts-"))
            best = cell(r for r in at if r["sampler"] == name)
            lines.append(f"| `{name}` | {calls} | {base} | {own} | {best} | {', '.join(others)} |")
    return "\n".join(lines)


def epsilon_table(rows: list[Row]) -> str:
    scales = sorted({row["epsilon_scale"] for row in rows})
    lines = ["| sampler, steps | " + " | ".join(f"{scale:g}" for scale in scales) + " |"]
    lines.append("|---" * (len(scales) + 1) + "|")
    for key in sorted({(row["sampler"], row["steps"]) for row in rows}):
        mine = [row for row in rows if (row["sampler"], row["steps"]) == key]
        cells = [cell(r for r in mine if r["epsilon_scale"] == scale) for scale in scales]
        lines.append(f"| `{key[0]}`, {key[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def label(row: Row) -> str:
    """The sampler and its correction."""
    if "epsilon_scale" in row:
        return f"{row['sampler']} with epsilon scale {row['epsilon_scale']:g}"
    options = row.get("sampler_options")
    return row["sampler"] + (f" {[*options.values()]}" if options else "")


def few_steps(rows: list[Row]) -> str:
    """The fewest calls of each sampler within 5 % of DDPM with 250."""
    target = [row for row in rows if row["sampler"] == "ddpm" and row["nfe"] == 250]
    if not target:
        return "DDPM with 250 calls is not there yet"
    limit = 1.05 * mean(target)
    lines = [f"DDPM with 250 calls: {mean(target):.4f}; within 5 % is {limit:.4f} or less. Those that come there:"]
    for name in dict.fromkeys(map(label, rows)):
        mine = {n: [r for r in rows if label(r) == name and r["nfe"] == n] for n in {r["nfe"] for r in rows}}
        reached = sorted(n for n, found in mine.items() if found and mean(found) <= limit)
        if reached:
            lines.append(f"{name}: {reached[0]} calls, {mean(mine[reached[0]]):.4f}")
    return "\n".join(lines)


def draw(nfe: list[Row], shift: list[Row], epsilon: list[Row], path: Path) -> None:
    load_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in dict.fromkeys(row["sampler"] for row in nfe):
        calls = sorted({row["nfe"] for row in nfe if row["sampler"] == name})
        values = [mean([r for r in nfe if r["sampler"] == name and r["nfe"] == n]) for n in calls]
        style = {"color": COLOURS.get(name), "linestyle": "--" if name.startswith("ts-") else "-"}
        left.plot(calls, values, marker="o", markersize=4, label=name, **style)
    left.set(xscale="log", yscale="log", xlabel="network calls an image", title="samplers")
    base = [row for row in nfe if row["sampler"] == "ddim" and row["steps"] == 10]
    for mode in ("target", "network", "both"):
        for variance, line in (("published", "-"), ("calibrated", ":")):
            wanted = {"exposure_mode": mode, "exposure_variance": variance, "exposure_cutoff": 100}
            mine = [r for r in shift if r["steps"] == 10 and wanted.items() <= r["sampler_options"].items()]
            points = sorted({r["sampler_options"]["exposure_window"] for r in mine})
            values = [mean([r for r in mine if r["sampler_options"]["exposure_window"] == w]) for w in points]
            colour = {"target": "#ff7f0e", "network": "#17becf", "both": "#1f77b4"}[mode]
            middle.plot(points, values, line, marker="o", markersize=4, color=colour, label=f"{mode}, {variance}")
    middle.set(xscale="log", yscale="log", xlabel="window w, cutoff 100", title="time-shift over DDIM, 10 steps")
    if base:
        middle.axhline(mean(base), color="black", linewidth=0.8, label="DDIM")
    for name, steps in sorted({(row["sampler"], row["steps"]) for row in epsilon}):
        mine = [row for row in epsilon if (row["sampler"], row["steps"]) == (name, steps)]
        plain = [r for r in nfe if r["sampler"] == name and r["steps"] == steps]
        known = {1.0: plain, **{s: [r for r in mine if r["epsilon_scale"] == s] for s in _scales(mine)}}
        points = sorted(scale for scale, found in known.items() if found)
        style = "-" if steps == 10 else "--"
        values = [mean(known[scale]) for scale in points]
        right.plot(points, values, style, marker="o", markersize=4, color=COLOURS[name], label=f"{name}, {steps} steps")
    right.set(yscale="log", xlabel="epsilon scale", title="epsilon scaling")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    left.set_ylabel("Fréchet distance")
    figure.savefig(path, dpi=100)


def _scales(rows: list[Row]) -> set[float]:
    return {row["epsilon_scale"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--extractor", default="random-conv-v1", help="whose distances, where rows have several")
    args = parser.parse_args()
    rows = [json.loads(line) for path in args.rows for line in path.read_text().splitlines()]
    rows = [{**row, "fd": row["fd"][args.extractor]} if isinstance(row["fd"], dict) else row for row in rows]
    names = ("nfe", "shift", "refine", "window", "epsilon", "few")
    parts = {part: [row for row in rows if row["part"] == part] for part in names}
    print(f"{nfe_table(parts['nfe'])}\n\n{few_steps(parts['nfe'] + parts['epsilon'] + parts['few'])}\n")
    print(f"{shift_table(parts['shift'])}\n\n{shift_table(parts['refine'])}\n")
    print(f"{window_table(parts['nfe'], parts['refine'] + parts['window'])}\n")
    print(epsilon_table(parts["epsilon"] + parts["few"]))
    if args.plot:
        draw(parts["nfe"], parts["shift"] + parts["refine"], parts["epsilon"] + parts["few"], args.plot)


if __name__ == "__main__":
    main()

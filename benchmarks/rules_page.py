"""The table, the findings and the plot of `benchmarks.rules`."""

import math
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

from benchmarks.rows import Row
from ditmoe.analysis.findings import judge, verdicts
from ditmoe.generate.pictures import load_matplotlib

DISTANCES = {"efficientnet-lite0": 0, "random-conv-v1": 3}  # and their decimals


def table(rows: list[Row], steps: int) -> str:
    """Markdown of what there is, means over seeds."""
    runs = [row for row in rows if row["phase"] == "train" and row["steps"] == steps]
    speed = next((row for row in reversed(rows) if row["phase"] == "speed"), {"train": {}, "passes": {}})
    images = ("held-out error", "against the twin", "against topk", "distances", "recognised")
    head = (
        "rule", "experts a token; in training", *images, *(f"{name}, shifted" for name in images),
        "place / time / class, % of the choice", "busiest; idle", "training", "drawing",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row["rule"] for row in runs):
        own = {shift: [r for r in runs if r["rule"] == name and r["shift"] == shift] for shift in (0, 4)}
        served, trained = (_mean([r.get(key) for r in own[0]], 2) for key in ("served", "experts_train"))
        served = served or ("" if name == "dense" else "?")  # of rows that did not count it
        cells = [name, f"{served}; {trained}" if trained else served]
        for shift in (0, 4):
            distances = [_mean([r.get(f"fd {n}") for r in own[shift]], d) for n, d in DISTANCES.items()]
            cells += [
                _mean([r["mse"] for r in own[shift]], 5),
                *(_against(runs, name, shift, b) for b in ("dense", "topk")),
            ]
            cells += [_joined(distances), _mean([r.get("recognised") for r in own[shift]], 3)]
        loads = [_mean([r.get("choice", {}).get(key) for r in own[0]], d) for key, d in (("busiest", 2), ("idle", 1))]
        cells += [_explained(own[0]), _joined(loads)]
        for kind in ("train", "passes"):
            base = speed[kind].get("dense")
            cells.append(f"{speed[kind][name] / base:.2f}" if base and name in speed[kind] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def findings(rows: list[Row], steps: int, rule: str) -> str:
    """DiT-MoE's findings in the runs of a rule, over its seeds."""
    wanted = {"phase": "train", "steps": steps, "rule": rule, "shift": 0}
    found = [row["findings"] for row in rows if wanted.items() <= row.items()]
    return verdicts(judge(found)) if found else ""


def _mean(values: list[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    return f"{mean(known):.{digits}f}" if known else ""


def _joined(cells: list[str]) -> str:
    return "; ".join(filter(None, cells))


def _differences(runs: list[Row], name: str, shift: int, base: str = "dense") -> list[float]:
    """Errors against another rule's, such as the twin's, of the same seed, in percent."""
    runs = [r for r in runs if r["shift"] == shift]
    twins = {r["seed"]: r["mse"] for r in runs if r["rule"] == base}
    return [100 * (r["mse"] / twins[r["seed"]] - 1) for r in runs if r["rule"] == name and r["seed"] in twins]


def _against(runs: list[Row], name: str, shift: int, base: str) -> str:
    """Mean difference to another rule in percent, its standard error over seeds, and how often it won."""
    found = _differences(runs, name, shift, base)
    if not found or name == base:
        return ""
    spread = f" ± {stdev(found) / math.sqrt(len(found)):.2f}" if len(found) > 1 else ""
    return f"{mean(found):+.2f} %{spread}, {sum(v < 0 for v in found)} of {len(found)}"


def _explained(own: list[Row]) -> str:
    chosen = [row["choice"] for row in own if row.get("choice", {}).get("choice")]
    shares = [[each[what] / each["choice"] for what in ("place", "time", "class")] for each in chosen]
    if not shares:
        return ""
    return " / ".join(f"{100 * mean(values):.0f}" for values in zip(*shares, strict=True))


def plot(rows: list[Row], steps: int, path: Path) -> None:
    """Held-out error against speed of training, both against the dense twin."""
    load_matplotlib()
    from matplotlib.figure import Figure

    runs = [r for r in rows if r["phase"] == "train" and r["steps"] == steps and r["shift"] == 0]
    speed = next((row["train"] for row in reversed(rows) if row["phase"] == "speed"), {})
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    errors_of = {name: _differences(runs, name, 0) for name in dict.fromkeys(r["rule"] for r in runs) if name in speed}
    for number, (name, errors) in enumerate(filter(itemgetter(1), errors_of.items()), start=1):
        x = speed[name] / speed["dense"]
        colour = "black" if name == "dense" else "tab:blue"
        axes.plot(x, mean(errors), "o", color=colour, markersize=4, label=f"{number} {name}, {mean(errors):+.1f} %")
        axes.annotate(f"{number}", (x, mean(errors)), textcoords="offset points", xytext=(4, 2), fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, handlelength=0)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(xlabel="training speed, of the dense twin", ylabel="held-out error against the twin, %")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)

"""What experts specialise in, in numbers: layer by layer, of a run, and over runs whether DiT-MoE's findings hold.

Source of the findings: DiT-MoE (arXiv 2407.11633), section 4.3: choice goes by place and time step and not by class;
deeper layers spread it more evenly; it is concentrated at the early, noisy steps of sampling.

Shapes: N images, n of each of Y classes, B time bins, T tokens of an image, E experts, L layers with experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..generate.pictures import spread
from .information import chance, entropy, entropy_given, interval, lift
from .routing import Array, relative_load, routing_summary
from .tally import Tally

Row = dict[str, Any]

CONDITIONS = ("place", "time", "class")
FINDINGS = {  # what holds where the value is above 0, and what the value is
    "place_and_time": (
        "experts go by place and time, not by class",
        "what the lesser of place and time explains of the choice, minus what the class does",
    ),
    "deeper_is_more_even": (
        "deeper layers are more even",
        "slope of the load's entropy (1: even) from the first layer with experts to the last",
    ),
    "noise_is_concentrated": (
        "choice is concentrated in noise, more even later",
        "entropy of the choice in the cleaner half of the time steps minus that in the noisier half, bits",
    ),
}  # fmt: skip
SHOWN_BINS = 10  # columns of the table by time


def layer_row(name: str, tally: Tally, seed: int) -> Row:
    """A layer in numbers.

    Returns:
        `entropy` of the expert, bits; `choice`, how many of them a condition may explain; `place`, `time` and `class`,
        how many each does beyond chance (nan: there is one class), and what `chance` gives; `all`, how many the three
        do together; `load_entropy` (1: even), `busiest`, `idle`; `load` and `contribution` (E,), over even shares, of
        the tokens and of the norm of what is added up; `routed`, their share of it beside the shared expert; `lift`
        (E, E); `entropy_by_time` (B,), and `given` (B,) place and class: this and `all` are nan where the images of a
        class are too few to tell.
    """
    (B, Y, _, E), images, rng = tally.counts.shape, tally.by_place.sum(axis=1), np.random.default_rng(seed)
    n, total = len(images) // Y, images.sum(axis=0)
    (summary,) = routing_summary(tally.counts[None])
    bits = {"place": summary["bits_position"], "time": summary["bits_time"], "class": summary["bits_class"]}
    by_chance = {
        "place": chance(tally.by_place, rng), "time": chance(tally.by_time, rng),
        "class": chance(images.reshape(Y, n, E).swapaxes(0, 1), rng) if Y > 1 else math.nan,  # at equal times
    }  # fmt: skip
    whole = float(entropy(total))
    choice = round(max(0.0, whole - tally.undecided), 9)
    by_time = entropy(tally.counts.sum(axis=(1, 2)))
    known = np.minimum(entropy_given(tally.counts.reshape(B, -1, E), n), by_time)
    enough = total.sum() / tally.counts[..., 0].size >= 4 * E  # assignments of a place and class at a noise level
    return {
        "layer": name, "entropy": whole, "choice": choice,
        **{key: beyond_chance(bits[key], by_chance[key], choice) for key in CONDITIONS}, "chance": by_chance,
        "all": round(whole - float(known.mean()), 9) if enough else math.nan,
        "load_entropy": whole / math.log2(E) if E > 1 else math.nan,
        "busiest": summary["busiest"], "idle": summary["idle"],
        "load": relative_load(total), "contribution": relative_load(tally.norms),
        "routed": tally.routed, "lift": lift(tally.pairs),
        "entropy_by_time": by_time, "given": known if enough else np.full(B, math.nan),
    }  # fmt: skip


def beyond_chance(bits: float, by_chance: float, choice: float) -> float:
    """Information about a choice of so many bits, of which chance gives some: 0 at chance, all where all is explained.

    (I - chance) / (choice - chance) of the choice: adjusted mutual information (Vinh et al., 2010).
    """
    if math.isnan(by_chance) or choice <= by_chance:
        return 0.0 * by_chance
    return round((bits - by_chance) / (choice - by_chance) * choice, 9)


def values_of(rows: Sequence[Row]) -> dict[str, float]:
    """What a run says to each of `FINDINGS`."""
    choice = np.mean([row["choice"] for row in rows])
    share = {key: float(np.mean([row[key] for row in rows]) / choice) if choice else math.nan for key in CONDITIONS}
    even, depth = np.array([row["load_entropy"] for row in rows]), np.linspace(0, 1, len(rows))
    sampling = np.mean([row["entropy_by_time"] for row in rows], axis=0)[::-1]  # from noise to image
    half = len(sampling) // 2
    return {
        "place_and_time": min(share["place"], share["time"]) - share["class"],
        "deeper_is_more_even": round(float(np.polyfit(depth, even, 1)[0]), 9) if len(rows) > 1 else math.nan,
        "noise_is_concentrated": round(float(sampling[-half:].mean() - sampling[:half].mean()), 9),
    }


def judge(runs: Sequence[Mapping[str, float]]) -> list[Row]:
    """Of each of `FINDINGS` its value in every run, mean, 95 % interval, and the verdict.

    It holds where the whole interval is above 0, does not where none of it is, and is undecided otherwise, as with one
    run.
    """
    judged = []
    for key, (sentence, measure) in FINDINGS.items():
        values = [run[key] for run in runs]
        mean, low, high = interval(np.array(values))
        verdict = "holds" if low > 0 else "does not hold" if high <= 0 else "undecided"
        judged.append({
            "finding": sentence, "measure": measure, "values": values, "mean": mean, "interval": [low, high],
            "verdict": verdict,
        })  # fmt: skip
    return judged


def mean_rows(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Of every layer the mean over runs, and after the layers the mean of them; lift stays the first run's."""
    layers = [
        {key: value if key in ("layer", "lift", "chance") else np.mean([run[i][key] for run in runs], axis=0)
         for key, value in row.items()}
        for i, row in enumerate(runs[0])
    ]  # fmt: skip
    scalars = [key for key, value in layers[0].items() if np.ndim(value) == 0 and key not in ("layer", "chance")]
    mean: Row = {key: np.mean([row[key] for row in layers]) for key in scalars}
    return [*layers, {**mean, "layer": "mean", **{k: np.mean([row[k] for row in layers], axis=0) for k in (
        "entropy_by_time", "given")}}]  # fmt: skip


def tables(rows: Sequence[Row], timesteps: Sequence[float]) -> str:
    """Markdown of what `mean_rows` gives: what the choice depends on, how even it is, and by time."""
    bins = [len(timesteps) - 1 - b for b in spread(len(timesteps), SHOWN_BINS)]
    return "\n".join([
        "What the choice of experts depends on, in bits (and of the choice) beyond chance", "",
        *markdown(["layer", "entropy", "choice", *CONDITIONS, "all three"], [
            [row["layer"], _number(row["entropy"]), _number(row["choice"]),
             *(_share(row, key) for key in (*CONDITIONS, "all"))]
            for row in rows
        ]), "",
        "How even it is: entropy of the load (1: even), busiest expert and largest contribution over the mean; and how",
        "much of a layer's output is the routed experts' and not the shared one's, by norm", "",
        *markdown(["layer", "entropy", "busiest", "idle", "routed", "contribution", "most often together"], [
            [row["layer"], _number(row["load_entropy"], 3), _number(row["busiest"]), f"{row['idle']:.3g}",
             _number(row["routed"]),
             *([_number(row["contribution"].max()), together(row["lift"])] if "lift" in row else ["", ""])]
            for row in rows
        ]), "",
        "Its entropy by time step, in bits, from noise to image, and where place and class are known", "",
        *markdown(["layer", *(f"t {timesteps[b]:.0f}" for b in bins)], [
            [row["layer"], *(f"{row['entropy_by_time'][b]:.2f}, {_number(row['given'][b])}" for b in bins)]
            for row in rows
        ]),
    ])  # fmt: skip


def verdicts(judged: Sequence[Row]) -> str:
    """Markdown of what `judge` gives."""
    several = len(judged[0]["values"]) > 1
    head = ["finding of DiT-MoE", "value", *(["95 % interval", "verdict"] if several else [])]
    rows = []
    for row in judged:
        ends = " to ".join(f"{x:+.3f}" for x in row["interval"]) if math.isfinite(row["interval"][0]) else "-"
        mean = f"{row['mean']:+.3f}" if math.isfinite(row["mean"]) else "-"
        rows.append([row["finding"], mean, *([ends, row["verdict"]] if several else [])])
    notes = [f"* {row['finding']}: {row['measure']}" for row in judged]
    more = [] if several else ["", "One run says nothing of another: give several, such as seeds, for intervals."]
    return "\n".join([*markdown(head, rows), "", *notes, *more])


def together(lifts: Array) -> str:
    """The pair of experts with the largest lift; a dash where none are chosen together."""
    if not np.isfinite(lifts).any():
        return "-"
    a, b = np.unravel_index(np.nanargmax(lifts), lifts.shape)
    return f"{min(a, b)} and {max(a, b)}, {lifts[a, b]:.1f} times chance"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _share(row: Row, key: str) -> str:
    share = row[key] / row["choice"] if row["choice"] else math.nan
    return f"{_number(row[key], 3)} ({_number(100 * share, 1)} %)" if math.isfinite(share) else _number(row[key])


def _number(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else "-"  # and no -0.0

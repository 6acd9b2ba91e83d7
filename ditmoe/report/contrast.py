"""The command analyze contrast: which experts serve one group of images more than another, and a policy for them.

Source: difference of activation rates, MoTE (arXiv 2502.11096). Shapes: L layers with experts, E experts, B time bins.
"""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from ..analysis.findings import markdown
from ..analysis.routing import Array
from ..analysis.tally import tally
from ..config.checks import plural
from ..config.contrast import ContrastArgs
from ..config.file import trained_by
from ..config.policy import Policy, Rule
from ..config.sample import label_or_name
from ..data.mixture import Mixture
from ..data.sets import ImageSet
from ..files import write_json
from ..generate.pictures import INK, MUTED
from ..model import DiTMoETransformer2DModel, moe_layer_names, tokens_per_image
from ..moe.policy import table
from ..pipeline import load
from ..pipeline.asked import labels_of
from .analyze import a_class_each, images_of, plain, shape_of
from .charts import bare_axes, figure, save_figure, title

SHOWN = 5  # experts over the noise


def run(args: ContrastArgs) -> None:
    """Print the table, write contrast.json, contrast.png and the policy.

    Raises:
        ValueError: The folder holds no model of ours with experts that can tell groups apart, there is no such group,
            or the policy cannot be followed.
    """
    (model,) = args.models
    config, net = trained_by(model), load(model, fast=True).transformer.eval()
    shape_of(net, model)
    if not {"token", "plain", "label"} & {*net.config.router_input.split("+")}:
        by = net.config.router_input.replace("+", " and ")
        raise ValueError(f"{model} chooses experts by {by} alone: they are the same for every group of images")
    data, source = images_of(args, config, net)
    groups = [_classes(words, data, net) for words in (args.a, args.b)]
    if both := {*groups[0]} & {*groups[1]}:
        raise ValueError(f"class {min(both)} is in a and in b; give groups that differ")
    rates = []
    for name, classes in zip("ab", groups, strict=True):
        chosen, x = a_class_each(data, classes, args.num, args.seed)
        print(f"{name}: {x.shape[0] * x.shape[1]} images of {plural(len(chosen), 'class')}, {source}", flush=True)
        counted = tally(net, config.objective, x, chosen, args.bins, args.seed)
        rates.append(np.stack([layer.by_time for layer in counted]) / tokens_per_image(net))  # (L, N, B, E)
    layers = [int(name.removeprefix("block ")) for name in moe_layer_names(net)]
    a, b = (r.mean(axis=(1, 2)) for r in rates)  # (L, E)
    error = np.sqrt(sum(r.mean(axis=2).var(axis=1, ddof=1) / r.shape[1] for r in rates))
    by_time = rates[0].mean(axis=1) - rates[1].mean(axis=1)  # (L, B, E)
    order = [(i, e) for i, e in zip(*np.unravel_index(np.argsort(b - a, axis=None), a.shape), strict=True)]
    top = [(i, e) for i, e in order[: args.top] if a[i, e] > b[i, e]]
    policy = Policy(tuple(Rule(layers[i], int(e), args.action, args.bias) for i, e in top))
    if args.policy is not None:  # refused before anything is written
        if not top:
            raise ValueError("no expert serves a more than b, so that a policy would be empty; give other groups")
        table(policy, net)
    least = [cell for cell in order[::-1][: args.top] if cell not in top][::-1]
    print(f"\n{_table(layers, [*top, *least], a, b, error)}\n")
    if weak := sum(a[cell] - b[cell] < 2 * error[cell] for cell in top):
        print(
            f"note: {weak} of the first {len(top)} may be chance, within two standard errors; --num takes more images"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    asked = {"model": str(model), "a": args.a, "b": args.b, "num": args.num, "bins": args.bins, "seed": args.seed}
    found = {"layers": layers, "rate_a": a, "rate_b": b, "difference": a - b, "error": error, "by_time": by_time}
    write_json(args.out / "contrast.json", plain({**asked, "source": source, **found, "top": policy.to_dict()}))
    names = f"{' + '.join(args.a)} over {' + '.join(args.b)}"
    _draw(args.out / "contrast.png", names, layers, a - b, by_time, top)
    print(f"wrote {args.out / 'contrast.json'} and {args.out / 'contrast.png'}")
    if args.policy is not None:
        write_json(args.policy, policy.to_dict())
        done = f"{args.action} {plural(len(top), 'expert')}"
        words = f"{quote(str(model))} --policy {quote(str(args.policy))}"
        print(f"wrote {args.policy}: {done}; python -m ditmoe sample {words}")


def _classes(words: Sequence[str], data: ImageSet, net: DiTMoETransformer2DModel) -> list[int]:
    """The labels of a group."""
    found: set[int] = set()
    for word in words:
        kind, _, which = word.partition("=")
        if kind == "class":
            found |= {*labels_of(label_or_name(which), net.config.num_classes, data.id2label)}
            continue
        sets = data.names if isinstance(data, Mixture) else ()
        if which not in sets or not data.id2label:
            known = f"those of this model are {', '.join(sets)}" if sets else "this model has one data set"
            raise ValueError(f"there is no domain {which!r} with labels: {known}")
        number = sets.index(which)
        start = sum(data.sizes[:number])
        found |= {*data.labels[start : start + data.sizes[number]].tolist()}
    if gone := [label for label in found if not (data.labels == label).any()]:
        raise ValueError(f"{data.source}: there is no image of class {gone[0]}")
    return sorted(found)


def _table(layers: Sequence[int], cells: Sequence[tuple[int, int]], a: Array, b: Array, error: Array) -> str:
    head = ["layer", "expert", "serves of a's tokens", "of b's", "difference"]
    rows = [
        [str(layers[i]), str(e), f"{a[i, e]:.1%}", f"{b[i, e]:.1%}", f"{a[i, e] - b[i, e]:+.1%} ± {error[i, e]:.1%}"]
        for i, e in cells
    ]
    return "\n".join(markdown(head, rows))


def _draw(
    path: Path, names: str, layers: Sequence[int], difference: Array, by_time: Array, top: Sequence[tuple[int, int]]
) -> None:
    """Every layer's experts as a matrix of differences, and those on top over the time steps."""
    (L, E), B = difference.shape, by_time.shape[1]
    fig = figure(max(3.4, 1.6 + 0.3 * L))
    matrix, lines = fig.subplots(1, 2, width_ratios=[3, 2])
    most = float(np.abs(difference).max()) or 1.0
    drawn = matrix.imshow(100 * difference, cmap="RdBu_r", vmin=-100 * most, vmax=100 * most, aspect="auto")
    for (i, e), value in np.ndenumerate(difference) if E <= 16 else ():
        ink: Any = INK if abs(value) < 0.6 * most else "white"
        matrix.text(e, i, f"{round(100 * value) + 0}", ha="center", va="center", fontsize=8, color=ink)
    matrix.set_yticks(range(L), [f"layer {layer}" for layer in layers])
    matrix.set_xticks(range(0, E, max(1, E // 16)))
    matrix.set_xlabel("expert", color=MUTED, fontsize=9)
    bare_axes(matrix)
    title(matrix, names)
    bar = fig.colorbar(drawn, ax=matrix, location="bottom", shrink=0.6, aspect=40)
    bar.set_label("% of tokens served, difference", color=MUTED, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    for k, (i, e) in enumerate(top[:SHOWN]):  # lines that coincide are both seen
        times, dashes = (np.arange(B) + 0.5) * 1000 / B, ("-", "--")[k % 2]
        lines.plot(times, 100 * by_time[i, :, e], dashes, linewidth=2, label=f"layer {layers[i]}, expert {e}")
    lines.set_xlim(1000, 0)
    lines.set_xlabel("t, from noise to image", color=MUTED, fontsize=9)
    bare_axes(lines)
    title(lines, "The same over the noise, in %")
    if top:
        lines.legend(frameon=False, fontsize=8, labelcolor=INK)
    save_figure(fig, path)

"""A run's page: samples, film strip, loss, expert maps, judgement and score, in report.json and index.html.

Shapes: N images, C channels, H W size, L layers with experts, B time bins, Y classes, T tokens of an image, E experts.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..analysis.routing import batch_a_class, chosen_classes, count_experts, routing_summary
from ..config.checks import plural
from ..config.file import differences, read_config, to_dict
from ..config.sections import Config
from ..data.open import open_data, open_held_out
from ..data.pixels import to_pixels, visible
from ..data.sets import BadImage, ImageSet, check_bad
from ..files import write_json, write_text
from ..generate import pictures
from ..generate.draw import balanced_labels, draw
from ..model import DiTMoETransformer2DModel, count_parameters, moe_layer_names, tokens_per_image
from ..pipeline import DiTMoEPipeline, load
from ..run_folder.log import read_rows
from ..run_folder.place import EXPERTS, FILM, LOSS, METRICS, PAGE, REPORT, SAMPLES, locked
from . import charts, page
from .facts import describe, summarise
from .maps import expert_loads, expert_maps

Images = NDArray[np.uint8]
Score = Callable[[Images], Mapping[str, Any]]
Judge = Callable[..., dict[str, Any]]
Real = tuple[ImageSet, list[int]]  # held-out images, and the rows of those that can be used
Part = TypeVar("Part")

NOT_JUDGED, NOT_SCORED = "Samples were not judged", "The samples were not scored"
REAL_NOT_SCORED = "The held-out images were not scored"
UNJUDGED = {"classes": None, "copies": None, "pixels": None}
TIME_BINS = 10
SHOWN_CLASSES = 12  # rows of the expert maps, at most
SHOWN_ROWS, SHOWN_COLUMNS = 20, 10  # of the sample grid
FEWEST_REAL = 100  # real training images that a judgement needs
MOST_REAL = {True: 60_000, False: 10_000}  # training images that a judgement reads: from memory, from files
ROUTING_FLOPS = 4e11  # about what counting the experts' work may cost


def write(run: Path, *, score: Score | None = None, judge: Judge | None = None) -> dict[str, Any]:
    """Write samples.png, film.png, loss.png, experts.png, report.json and index.html into a finished run's folder.

    Args:
        run: a run folder: config.json, metrics.jsonl and model/ are read, command.txt if it is there.
        score: uint8 images (N, H, W, C) -> a JSON report with "metric", "value" and "n_gen", such as eval.fid.score
            with the training set as reference. Held-out real images are scored too. None leaves both out.
        judge: `eval.judge.judge`; None leaves out whether samples show their class and are copies.

    Returns:
        What report.json holds.

    Raises:
        ValueError: the folder holds no such run, or its data set is gone. What else cannot be had is left out with a
            sentence among the report's notes.
    """
    config = read_config(run)
    pipe, sample = load(run, fast=True), config.sample
    net, size, channels = pipe.transformer, pipe.transformer.config.sample_size, pipe.transformer.config.in_channels
    data = open_data(config.data, size=size, channels=channels)
    notes: list[str] = []
    real = _tried(notes, "No held-out set", lambda: _held_out(config, size, channels, notes), None)
    (run / PAGE).unlink(missing_ok=True)  # the last to come: where it is missing, a report was interrupted
    num = sample.num
    labels, started = balanced_labels(pipe, num), time.perf_counter()
    guidance = 1.0 if labels is None else sample.cfg
    images = draw(
        pipe, labels, num, sampler=sample.sampler, steps=sample.steps, cfg=guidance, seed=config.seed,
        batch_size=sample.batch_size,
    )  # fmt: skip
    seconds = round(time.perf_counter() - started, 2)
    rows = read_rows(run / METRICS)
    for name in page.CAPTIONS:
        (run / name).unlink(missing_ok=True)  # none may be left from another report
    pictures.write_grid(images, labels, pipe.id2label, run / SAMPLES, columns=SHOWN_COLUMNS, most_rows=SHOWN_ROWS)
    none: tuple[list[dict[str, Any]], dict[str, Any] | None] = ([], None)
    film = _tried(notes, "There is no film", lambda: _draw_film(pipe, config, labels, run / FILM), None)
    if rows:
        charts.loss_curve(rows, run / LOSS)
    experts, loads = _tried(notes, "No routing", lambda: _draw_experts(net, config, data, run / EXPERTS), none)
    judged = _tried(notes, NOT_JUDGED, lambda: _judge(judge, images, labels, data, real, config), UNJUDGED)
    scored = _tried(notes, NOT_SCORED, lambda: _score(score, images), None)
    compared = None if scored is None or real is None else score
    report = {
        **describe(run, net, config, data, 0 if real is None else len(real[1])),
        "training": summarise(rows, config),
        "sampling": {
            "num": num, "sampler": sample.sampler, "steps": sample.steps,
            "nfe": pipe.network_calls(sample.sampler, sample.steps), "guidance": guidance, "seed": config.seed,
            "seconds": seconds,
        },
        "experts": experts,
        **judged,
        "score": scored,
        "score_real": _tried(notes, REAL_NOT_SCORED, lambda: _score(compared, _some(real, len(images))), None),
    }  # fmt: skip
    report["notes"] = notes + _notes(report, images, " ".join(notes))
    write_json(run / REPORT, report)
    shown = {name: (run / name).read_bytes() for name in page.CAPTIONS if (run / name).exists()}
    write_text(run / PAGE, page.render(report, shown, to_dict(config), {"film": film, "loads": loads}))
    print(_summary(report), flush=True)
    return report


def _tried(notes: list[str], failed: str, part: Callable[[], Part], empty: Part) -> Part:
    """A part of the page; where it cannot be had `empty`, and a note on why: the run is finished without it."""
    try:
        return part()
    except ValueError as error:
        notes.append(f"{failed}: {error}.")
        return empty


def finish(config: Config, score: Score | None, judge: Judge, *, news: bool) -> None:
    """The end of a training run: its page, where the run has `news` or none, and a line that says where, or why not.

    Options of the section `sample` are not those of a page that was there, which a line says.
    """
    if news or not (config.out / PAGE).exists():
        with locked(config):
            try:
                write(config.out, score=score, judge=judge)
            except (ValueError, FloatingPointError) as error:
                said = f"{config.out} is finished, but for its page ({error}); the same command tries again"
                return print(f"warning: {said}", file=sys.stderr)
    if changed := differences(to_dict(read_config(config.out))["sample"], to_dict(config)["sample"], "sample."):
        print(f"note: the page stays as it was ({'; '.join(changed)}): the run was finished; sample.py draws anew")
    print(f"{config.out} is finished: see {config.out / PAGE}, or python -m ditmoe sample {quote(str(config.out))}")


def _summary(report: Mapping[str, Any]) -> str:
    """The judgement and the score in a few lines."""
    lines = []
    if classes := report["classes"]:
        lines.append(
            f"recognised as the class asked for: {classes['accuracy']:.1%} of {report['sampling']['num']} samples "
            f"({classes['real_accuracy']:.1%} of {classes['num_real']} held-out real images)"
        )
    if copies := report["copies"]:
        lines.append(f"nearest-neighbour copies: {copies['share']:.1%} ({copies['real_share']:.1%} of real images)")
    if pixels := report["pixels"]:
        beside = ""
        if "num_real" in pixels:
            few, real = (f"{pixels[name]:.3g}" for name in ("few_value", "real_value"))
            beside = f" ({pixels['num_real']} of them: {few}, held-out real images: {real})"
        lines.append(f"Fréchet distance of the pixels: {pixels['value']:.3g}{beside}")
    if score := report["score"]:
        real = report["score_real"]
        beside = f" (held-out real images: {real['value']:.4g})" if real else ""
        lines.append(f"{score['metric']}: {score['value']:.4g}{beside}")
    return "\n".join(lines)


def _draw_film(pipe: DiTMoEPipeline, config: Config, labels: list[int] | None, path: Path) -> dict[str, Any]:
    """Four of the judged images (evenly chosen classes) on their way from noise; what is where in the picture."""
    indices = pictures.spread(4 if labels is None else len(set(labels)), 4)  # the first image of every class
    chosen = None if labels is None else [labels[i] for i in indices]
    states: list[tuple[Tensor, Tensor, float]] = []

    def note(step: int, t: Tensor, x_t: Tensor, x_0: Tensor | None) -> None:
        assert x_0 is not None, "our samplers tell what they predict"
        states.append((x_t.clone(), x_0.clone(), float(t)))

    pipe(
        chosen, num_images=len(indices) if chosen is None else None, sampler=config.sample.sampler,
        num_inference_steps=config.sample.steps, guidance_scale=None if chosen is None else config.sample.cfg,
        seed=config.seed, indices=indices, output_type="pt", callback=note,
    )  # fmt: skip
    x_t, x_0, times = zip(*(states[k] for k in pictures.spread(len(states), 12)), strict=True)
    noisy, clean = (np.stack([visible(to_pixels(pipe.decode(x))) for x in some], axis=1) for some in (x_t, x_0))
    names = None if chosen is None else [pipe.id2label.get(label, str(label)) for label in chosen]
    return pictures.film_strip(noisy, clean, times, path, names=names)


def _draw_experts(
    net: DiTMoETransformer2DModel, config: Config, data: ImageSet, path: Path
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Write the expert maps, where there are experts; the same in numbers, a row a layer, and expert by expert."""
    if not (layers := moe_layer_names(net)):
        return [], None
    classes = chosen_classes(data, SHOWN_CLASSES)
    cost = 2 * count_parameters(net)[1] * tokens_per_image(net) * len(classes) * TIME_BINS  # of an image of each
    chosen, x = batch_a_class(data, classes, int(np.clip(ROUTING_FLOPS / cost, 2, 32)), config.seed)
    counts = count_experts(net, config.objective, x, chosen, TIME_BINS, config.seed)
    side = net.config.sample_size // net.config.patch_size
    known: Any = {
        "class_names": [data.id2label.get(c, "all images") for c in chosen], "grid": (side, side),
        "layer_names": layers, "timesteps": [(b + 0.5) * 1000 / TIME_BINS for b in range(TIME_BINS)],
    }  # fmt: skip
    expert_maps(counts, path, **known)
    rows = [{"layer": name, **row} for name, row in zip(layers, routing_summary(counts), strict=True)]
    return rows, expert_loads(counts, **known)


def _judge(
    judge: Judge | None, images: Images, labels: list[int] | None, data: ImageSet, held_out: Real | None,
    config: Config,
) -> dict[str, Any]:  # fmt: skip
    """The parts "classes", "copies" and "pixels" of the report, each None where it cannot be had."""
    if judge is None or data.is_latent or len(data) < FEWEST_REAL:
        return dict(UNJUDGED)
    shuffled = np.random.default_rng(config.seed).permutation(len(data))
    rows = data.readable(shuffled[: MOST_REAL[data.in_memory]].tolist())
    names = [data.id2label.get(c, str(c)) for c in range(len(data.id2label))]
    real = None if held_out is None else (held_out[0].images(held_out[1]), held_out[0].labels[held_out[1]])
    return judge(
        images, None if labels is None else np.asarray(labels), data.images(rows), data.labels[rows], real, names,
        mirrored=config.data.flip, seed=config.seed,
    )  # fmt: skip


def _score(score: Score | None, images: Images | None) -> dict[str, Any] | None:
    """The parts "score" and "score_real" of the report; latents have no score."""
    return None if score is None or images is None or images.shape[-1] not in (1, 3) else dict(score(images))


def _held_out(config: Config, size: int, channels: int, notes: list[str]) -> Real | None:
    """The set that was held out and the rows that can be used; others are named in a note, up to data.max_bad of them.

    ValueError where there are more of them, or where nothing is left.
    """
    data = open_held_out(config.data, size=size, channels=channels)
    if data is None:
        return None
    bad: dict[int, str] = {}
    for row in range(len(data)):
        try:
            data.images([row])
        except (BadImage, RuntimeError) as error:  # the latter: for no reason that is known; it names the file
            bad[row] = str(error)
    check_bad([*bad.values()], config.data.max_bad)
    if len(bad) == len(data):
        raise ValueError(f"none of {len(data)} images can be used; the first: {bad[0]}")
    if bad:
        shown = "; ".join([*bad.values()][:5]) + ("; ..." if len(bad) > 5 else "")
        notes.append(f"{plural(len(bad), 'held-out image')} left out: {shown}.")
    return data, [row for row in range(len(data)) if row not in bad]


def _some(held_out: Real | None, most: int) -> Images | None:
    """Held-out images that stand for all of them, at most so many."""
    return None if held_out is None else held_out[0].images(held_out[0].in_proportion(held_out[1], most))


def _notes(report: Mapping[str, Any], images: Images, known: str) -> list[str]:
    """Sentences on what is missing, and why, but what is `known`."""
    notes = []
    if not report["model"]["moe_layers"]:
        notes.append("This model has no experts (a dense twin), so there are no expert maps.")
    if report["copies"] is None and NOT_JUDGED not in known:
        why = "latents have no pixels" if report["data"]["is_latent"] else f"fewer than {FEWEST_REAL} training images"
        notes.append(f"Samples were not compared with training images: {why}.")
    elif report["copies"] and report["copies"]["num_train"] < report["data"]["num_train"]:
        few, all_of_them = report["copies"]["num_train"], report["data"]["num_train"]
        notes.append(f"Copies were looked for among {few:,} of {all_of_them:,} training images, drawn at random.")
    if report["score"] is None and NOT_SCORED not in known:
        notes.append(f"{NOT_SCORED}.")
    if images.shape[-1] not in (1, 3):
        notes.append(f"The pictures show latents, {visible(images).shape[-1]} of {images.shape[-1]} channels.")
    return notes

"""A run's page: one HTML text from the facts of `report.json` and the pictures, with nothing to fetch."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PREDICTS = {
    "epsilon": "the noise",
    "v_prediction": "the velocity v",
    "sample": "the clean image",
    "flow_prediction": "the flow velocity",
}
CAPTIONS = {
    "samples": (
        "Samples",
        "A row is a class; these are the first samples of the seed, none was picked. Every row should show its class,"
        " and its images should differ.",
    ),
    "film": (
        "Denoising",
        "Left to right, from noise (t near 1000) to image; below each noisy state is the clean image that the model"
        " predicts from it. Where that stops changing, the rest of the steps only refine.",
    ),
    "loss": (
        "Training",
        "Faint: logged values; strong: their moving average. The load is that of the worst layer and near 1 when"
        " experts share the work evenly.",
    ),
    "experts": (
        "Experts",
        "Which expert serves what, on noised training images: white is the even load, red more, blue less. A column of"
        " one colour is an expert in general favour; a column that changes colour is one that specialises.",
    ),
}


def render(report: Mapping[str, Any], pictures: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """The page of a run as one HTML text.

    Args:
        report: what `report.write` returns.
        pictures: PNG files by the keys of `CAPTIONS`; one that is missing is left out.
        config: the run's config.json, shown folded.
    """
    figures = [
        (key, *CAPTIONS[key], "data:image/png;base64," + base64.b64encode(pictures[key]).decode())
        for key in CAPTIONS
        if key in pictures
    ]
    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return room.get_template("page.html").render(
        report=report, lede=lede(report), cards=cards(report), figures=figures, protocol=protocol(report),
        usage=usage(report), config=json.dumps(config, indent=2),
    )  # fmt: skip


def lede(report: Mapping[str, Any]) -> str:
    """What was trained on what, in a few short sentences."""
    m, data, training = report["model"], report["data"], report["training"]
    kind = f"Class-conditional ({m['num_classes']} classes)" if m["num_classes"] else "Unconditional"
    height, width, channels = m["size"]
    what = "latents" if data["is_latent"] else "pixels"
    experts = "none with experts"
    if m["moe_layers"]:
        shared = " and a shared one" if m["shared_width"] else ""
        experts = f"{m['moe_layers']} of them with {m['num_experts']} experts; a token uses {m['top_k']}{shared}"
    return (
        f"{kind} diffusion transformer on {height}×{width}×{channels} {what}: {m['depth']} blocks of width"
        f" {m['hidden_size']}, {experts}. Trained for {training['steps']:,} steps of {training['batch_size']:,} images"
        f" to predict {PREDICTS[m['prediction_type']]}. Data: {data['source']}."
    )


def cards(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The key numbers: (name, value, what to compare it with)."""
    score, real = report["score"], report["score_real"]
    if score and "value" in score:
        beside = f"{report['sampling']['num']:,} samples"
        if real:
            beside += f"; {real['n_gen']:,} held-out real images: {_number(real['value'])}"
        yield str(score.get("metric", "score")), _number(score["value"]), beside
    classes, copies = report["classes"], report["copies"]
    if classes:
        beside = f"of samples; {classes['real_accuracy']:.1%} of held-out real images, by the same classifier"
        yield "show their class", f"{classes['accuracy']:.1%}", beside
    if copies:
        beside = f"of samples; {copies['real_share']:.1%} of real images, by the same rule"
        yield "count as copies", f"{copies['share']:.1%}", beside
    m, training = report["model"], report["training"]
    beside = f"{_millions(m['parameters_activated'])} of them activated by a token"
    yield "parameters", _millions(m["parameters_total"]), beside
    if training["seconds"]:
        beside = f"{training['steps']:,} steps, {training['images_per_second']:,.0f} images a second"
        yield "training time", duration(training["seconds"]), beside
    if training["final_loss"] is not None:
        yield "training loss", _number(training["final_loss"]), "mean of the last tenth of the log"


def protocol(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of everything that the numbers depend on."""
    s, machine = report["sampling"], report["machine"]
    guided = f"guidance {s['guidance']:g}" if report["model"]["num_classes"] else "no labels"
    yield "samples", f"{s['num']:,}, classes in equal parts, averaged (EMA) weights, seed {s['seed']}"
    yield "sampler", f"{s['sampler']}, {s['steps']} steps, {guided}; {duration(s['seconds'])}"
    if report["classes"]:
        c = report["classes"]
        yield (
            "class shown",
            f"by a small convolutional network trained on {c['num_train']:,} real training images, right on"
            f" {c['real_accuracy']:.1%} of {c['num_real']:,} held-out ones; weakest class of the samples:"
            f" {c['worst'][0]} ({c['worst'][1]:.1%})",
        )
    if report["copies"]:
        c = report["copies"]
        yield "copies", c["definition"]
        yield (
            "distance to training set",
            f"median {c['distance']:.1f} grey levels (RMS of a pixel) for samples, {c['real_distance']:.1f} for real"
            " images",
        )
    yield from _score_rows(report["score"] or {})
    yield "machine", ", ".join(f"{key} {value}" for key, value in machine.items() if value)


def usage(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it does, command) for what one does next."""
    run = shlex.quote(report["run"])
    labels = " --classes 0 0 1 1" if report["model"]["num_classes"] else " --num 16"
    yield (
        "Draw more images (--out may also be an .npz file or a folder)",
        f"python sample.py {run}{labels} --out more.png",
    )
    yield (
        "The same from Python",
        f"from pathlib import Path\nfrom ditmoe import pipeline\npipe = pipeline.load(Path({report['run']!r}))\n"
        + ("images = pipe([0, 1]).images" if report["model"]["num_classes"] else "images = pipe(num_images=2).images"),
    )
    if report["command"]:
        yield "Go on after an interruption: the command that made it, once more", report["command"]


def _score_rows(score: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The score with its protocol: one row of counts, then one of every other entry that is not empty."""
    head = ("metric", "value", "n_gen", "n_ref", score.get("metric", "metric"))
    if "value" in score:
        counts = " against ".join(f"{score[k]:,}" for k in ("n_gen", "n_ref") if score.get(k))
        yield "score", f"{score.get('metric', 'value')} {_number(score['value'])}; {counts} images"
    for name, value in score.items():
        if name not in head and value not in (None, "", [], {}):
            yield f"score: {name}", _text(value)


def _text(value: Any, name: str = "") -> str:
    """A JSON value on one line; long hashes are cut."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item, key)}" for key, item in value.items() if item not in (None, ""))
    if isinstance(value, list | tuple):
        return ("×" if name == "shape" else "; ").join(_text(item) for item in value)
    return f"{str(value)[:12]}…" if name == "sha256" else str(value)


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, or 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"

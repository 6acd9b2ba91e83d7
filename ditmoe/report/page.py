"""A run's page: one HTML text from the facts of `report.json` and the pictures, with nothing to fetch."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

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
STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --panel: #fff; --ink: #1f2430; --muted: #646b78; --line: #e3e5e9;
  --accent: #2b6cb0; --code: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --panel: #1c1f25; --ink: #e6e8ec; --muted: #9aa2b1;
  --line: #31353d; --accent: #7db4ea; --code: #23272e; } figure img { filter: brightness(.9); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1104px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p { margin: .4rem 0; max-width: 72ch; }
.small, figcaption, .card span, th { color: var(--muted); font-size: .875rem; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; margin: .6rem 0;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
pre.command { user-select: all; white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: .75rem; margin: 1.4rem 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { display: block; line-height: 1.4; }
.card .name { color: var(--ink); overflow-wrap: anywhere; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: 10px; margin: .6rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; vertical-align: top; padding: .35rem 1.2rem .35rem 0; }
td { vertical-align: top; padding: .35rem .8rem .35rem 0; overflow-wrap: anywhere; }
tr { border-bottom: 1px solid var(--line); }
.facts th { width: 13.5rem; }
.numbers td, .numbers thead th { text-align: right; padding-right: 1rem; }
.numbers thead th:first-child { text-align: left; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--accent); }
"""


def render(report: Mapping[str, Any], pictures: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """The page of a run as one HTML text.

    Args:
        report: what `report.write` returns.
        pictures: PNG files by the keys of `CAPTIONS`; one that is missing is left out.
        config: the run's config.json, shown folded.
    """
    title = escape(report["title"])
    figures = "".join(_figure(key, pictures[key], report["experts"]) for key in CAPTIONS if key in pictures)
    uses = "".join(
        f'<p class="small">{escape(what)}</p><pre class="command">{escape(line)}</pre>' for what, line in usage(report)
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in report["notes"])
    command = report["command"] or "not recorded"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · ditmoe run</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{escape(lede(report))}</p>
<pre class="command">{escape(command)}</pre>
<div class="cards">{"".join(_card(*card) for card in cards(report))}</div>
{notes}
{figures}
<h2>How it was measured</h2>
<div class="wide"><table class="facts">{"".join(_row(*pair) for pair in protocol(report))}</table></div>
<h2>Use it</h2>
{uses}
<h2>Configuration</h2>
<details><summary>config.json</summary><pre>{escape(json.dumps(config, indent=2))}</pre></details>
<p class="small">Written {escape(report["written"])} by ditmoe {escape(report["machine"]["ditmoe"])}.</p>
</main>
</body>
</html>
"""


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


def _figure(key: str, png: bytes, experts: Sequence[Mapping[str, Any]]) -> str:
    heading, caption = CAPTIONS[key]
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    table = _expert_table(experts) if key == "experts" else ""
    return (
        f'<h2>{heading}</h2><figure><img src="{source}" alt="{escape(heading)}: {escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>{table}\n"
    )


def _expert_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("layer", "busiest ÷ even load", "idle experts", "bits from time", "bits from class", "bits from position")
    keys = ("busiest", "idle", "bits_time", "bits_class", "bits_position")
    body = "".join(
        f"<tr><th>{escape(row['layer'])}</th>"
        + "".join(f"<td>{row[key]:.3f}</td>" if key != "idle" else f"<td>{row[key]}</td>" for key in keys)
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="small">Bits: mutual information between the chosen expert and time, class or position; 0 means the'
        " choice does not depend on it.</p>"
    )


def _card(name: str, value: str, beside: str) -> str:
    return (
        f'<div class="card"><span class="name">{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(beside)}</span></div>"
    )


def _row(name: str, value: str) -> str:
    return f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"


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

"""A model to give away: the pipeline of a run in bfloat16, with a page that says how it came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import pipeline
from ..asked import EXPERTS_OFF
from ..config.file import read_config
from ..config.sample import ExportArgs
from ..files import read_object
from ..run_folder.network import load_guide
from ..run_folder.place import COMMAND, CONFIG, REPORT


def export(args: ExportArgs) -> None:
    """Write the pipeline folder: weights in `dtype`, the run's config.json as training.json, and a README.md.

    Raises:
        ValueError: The run holds no model, the folder exists, the VAE is not that of the latents, or the guide cannot
            guide it.
    """
    if args.folder.exists() and any(args.folder.iterdir()) and not args.force:
        raise ValueError(f"folder {args.folder} is not empty; give another one, or --force to replace it")
    read_config(args.run)  # refuses what is no run
    page = card(args)  # before anything is written
    pipe = pipeline.load(args.run)
    if args.vae is not None:
        pipeline.add_vae(pipe, args.vae)
    if args.guide is not None:
        guide = args.guide if args.guide == EXPERTS_OFF else load_guide(Path(args.guide), pipe)
        pipeline.add_guide(pipe, guide, args.guide_scale)
    for net in (pipe.transformer, pipe.guide):
        if net is not None:
            torch.nn.Module.to(net, getattr(torch, args.dtype))  # diffusers' own `to` warns without a reason
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save(pipe, args.folder)
    (args.folder / "training.json").write_text((args.run / CONFIG).read_text())
    (args.folder / "README.md").write_text(page)
    print(f"wrote {args.folder}; python sample.py {args.folder} --out grid.png draws from it")


def card(args: ExportArgs) -> str:
    """The model's page: the commands that made it, what it was trained on, and its score if the run has one."""
    report, runs = args.run / REPORT, [args.run, *([Path(args.guide)] if args.guide else [])]
    files = [run / COMMAND for run in runs if (run / COMMAND).exists()]
    commands = dict.fromkeys(line for file in files for line in file.read_text().splitlines())
    guide = "" if args.guide is None else f" --guide {args.guide}"
    guide += "" if args.guide_scale is None else f" --guide-scale {args.guide_scale}"
    lines = [
        f"# {args.folder.name}", "", "A diffusion transformer with mixture-of-experts layers, made by ditmoe:", "",
        "```", *commands, f"python -m ditmoe export {args.run} {args.folder} --dtype {args.dtype}{guide}", "```", "",
        *(_facts(read_object(report)) if report.exists() else []),
        f"`python sample.py {args.folder} --out grid.png` draws a grid of samples.", "",
        *([f"They are guided by {args.guide}; `--guide none` draws without.", ""] if args.guide else []),
    ]  # fmt: skip
    return "\n".join(lines)


def _facts(report: dict[str, Any]) -> list[str]:
    model, score = report["model"], report.get("score")
    lines = [
        f"* {model['parameters_total'] / 1e6:.2f} M parameters, "
        f"{model['parameters_activated'] / 1e6:.2f} M activated by a token",
        f"* data: {report['data']['source']}",
        f"* {report['training']['steps']} steps of {report['training']['batch_size']} images",
    ]
    if score:
        lines.append(f"* {score['metric']} {score['value']:.4f} with {score['n_gen']} samples")
    return [*lines, ""]

"""What a run shows while it trains."""

import json
from collections.abc import Callable
from typing import Any

from ..config.sections import Config
from ..files import write_text
from ..generate.draw import balanced_labels, draw
from ..generate.pictures import write_grid
from ..pipeline import DiTMoEPipeline
from ..run_folder.place import PROGRESS


def progress(config: Config, step: int, pipe: DiTMoEPipeline, score: Callable[..., dict[str, Any]] | None) -> None:
    """What a run shows while it trains: progress/step-000500.png, and a row of progress/scores.jsonl.

    Always the same images of the run's seed, so that the pictures of two steps can be laid side by side.
    """
    labels = balanced_labels(pipe, config.sample.num)
    images = draw(
        pipe, labels, config.sample.num, steps=config.sample.steps, cfg=config.sample.cfg if labels else None,
        seed=config.seed, batch_size=config.sample.batch_size,
    )  # fmt: skip
    folder = config.out / PROGRESS
    folder.mkdir(exist_ok=True)
    shown = 8 * max(len(pipe.id2label), 1)
    write_grid(images[:shown], labels and labels[:shown], pipe.id2label, folder / f"step-{step:06d}.png")
    if score is not None:
        try:
            report = score(images)
        except ValueError as error:
            return print(f"warning: there is no score of step {step} ({error})", flush=True)
        row = {"step": step, "metric": report["metric"], "value": report["value"], "num": len(images)}
        path = folder / "scores.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [old for old in rows if old["step"] < step] + [row]  # a resumed run comes by again
        write_text(path, "".join(json.dumps(each) + "\n" for each in rows))

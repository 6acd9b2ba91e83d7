"""Sets of images too large for memory: drawn by several processes, written to disk, continued after an interruption.

Image i is a function of (seed, i, its label) alone, so a set does not depend on the batch size, on the number of
processes, or on how often it was interrupted. Shapes: N images, C channels, H W size; pictures are uint8 (N, H, W, C).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.file import read_config
from ..config.sample import SampleArgs
from ..data.pixels import QUANTIZE
from ..pipeline import best_device, load
from .draw import balanced_labels, draw_all
from .pictures import write_grid
from .set_files import ImageSet, Processes, write_folder, write_npz

PIPELINE_OPTIONS = ("eta", "guidance_interval", "guidance_channels", "guidance_rule", "epsilon_scale")


def run(args: SampleArgs, processes: Processes, score: Callable[[dict[str, Any] | Path], None] | None = None) -> None:
    """What `sample.py` does: load, draw, write, score, say where.

    Args:
        args: The command line.
        processes: Those that share the work.
        score: Scores a set as it is drawn, or the file or folder it was written to.

    Raises:
        ValueError: A model that cannot be loaded, a value that does not fit it, or an output that exists.
    """
    out = args.out or (None if score else Path("samples.png"))
    if out is not None and out.suffix == ".jpg":
        raise ValueError(f"out {out}: give a .png or .npz file, or a folder of PNG files")
    images = requested(args)
    if images.are_latents and (score or out is None or out.suffix != ".png"):  # the grid is there to look at them
        raise ValueError(
            f"{args.model} makes latents of {images.shape[-1]} channels and holds no VAE to decode them; give it one: "
            "python -m ditmoe export MODEL FOLDER --vae PATH"
        )
    if score and out is not None and out.suffix == ".png":
        raise ValueError(f"out {out}: a scored set goes to an .npz file or a folder; without --out nothing is kept")
    if out is None:
        assert score is not None
        score(images.source(args.model))
        return
    if out.suffix == ".npz":
        write_npz(images, out, args.batch_size, processes)
    elif out.suffix == ".png":
        if processes.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            pictures = draw_all(images.pipe, images.labels, images.num, images.options, args.batch_size)
            write_grid(pictures, images.labels, images.pipe.id2label, out)
    else:
        write_folder(images, out, args.batch_size, processes)
    if processes.rank == 0:
        sampler = images.facts["sampler"]
        what = f"{sampler['name']}, {sampler['steps']} steps, {sampler['nfe']} network calls an image"
        print(f"{images.num} images in {out} ({what})", flush=True)
    if score:
        score(out)


def requested(args: SampleArgs) -> ImageSet:
    """The set that a command line asks for."""
    pipe = load(args.model).to(best_device())
    if args.classes is not None:
        labels: list[int] | None = list(args.classes)
        num, sampling = len(args.classes), "given"
    else:
        num = args.num or 8 * min(max(len(pipe.id2label), 1), 20)
        labels = balanced_labels(pipe, num)
        sampling = "none" if labels is None else "balanced"
    name, steps = args.sampler or pipe.config.sampler, args.steps or pipe.config.num_inference_steps
    cfg = args.cfg if args.cfg is not None or labels is None else pipe.config.guidance_scale
    more = {option: getattr(args, option) for option in PIPELINE_OPTIONS}
    options = {"sampler": name, "num_inference_steps": steps, "guidance_scale": cfg, "seed": args.seed, **more}
    options["sampler_options"] = args.sampler_options()
    if args.flow_shift is not None and not name.startswith("flow-"):
        raise ValueError(f"sampler {name!r} has no flow_shift; it belongs to flow-euler, flow-heun, flow-sde")
    scheduler = pipe.scheduler_for(name, steps, args.sampler_options())
    facts = {
        "checkpoint": _checkpoint(args.model),
        "ema_decay": _ema_decay(args.model),
        "vae": None if pipe.vae is None else getattr(pipe.vae.config, "_name_or_path", "unknown"),
        "sampler": {
            "name": name, "steps": steps, "nfe": len(scheduler.timesteps), "cfg": cfg, **more,
            **args.sampler_options(), **_time_shift(scheduler),
        },
        "seed": args.seed,
        "label_sampling": sampling,
        "labels_sha256": None if labels is None else hashlib.sha256(repr(labels).encode()).hexdigest(),
        "num": num,
        "quantize": QUANTIZE,
        "dtype": "float32",
        "device": pipe.device.type,
    }  # fmt: skip
    return ImageSet(pipe, labels, num, options, json.loads(json.dumps(facts)))


def _time_shift(scheduler: Any) -> dict[str, Any]:
    """What a `ts-*` goes by, the window being that of its steps; nothing of other samplers."""
    found = {field: value for field, value in scheduler.config.items() if field.startswith("exposure_")}
    if not found:
        return {}
    criterion = found["exposure_variance"] or "published"  # which is a variance of 0
    return {**found, "exposure_variance": criterion, "exposure_window": scheduler.window}


def _checkpoint(model: Path) -> dict[str, Any]:
    """Path and training steps of a model, and a hash of its weights and settings, scheduler and VAE included."""
    folder = model if (model / "model_index.json").is_file() else model / "model"
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            with file.open("rb") as handle:
                content = hashlib.file_digest(handle, "sha256").digest()
            digest.update(file.relative_to(folder).as_posix().encode() + content)
    config = folder.parent / "config.json"
    going_on = config.is_file() and config.stat().st_mtime > (folder / "model_index.json").stat().st_mtime
    steps = None if going_on else _of_run(model, "max_steps")  # a longer run has begun: the file is ahead of the model
    return {"path": str(model), "steps": steps, "sha256": digest.hexdigest()}


def _ema_decay(model: Path) -> float | None:
    train = _of_run(model, "train")
    return None if train is None else float(train.ema_decay)


def _of_run(model: Path, field: str) -> Any:
    """A field of the configuration that trained a model, None where it is not there."""
    for folder, name in ((model, "config.json"), (model, "training.json"), (model.parent, "config.json")):
        if (folder / name).is_file():
            try:
                return getattr(read_config(folder, name), field)
            except ValueError:
                continue
    return None


# ---- files

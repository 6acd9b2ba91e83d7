"""What `sample.py` is asked for: drawn, written, scored; and the facts of how it was made."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.checks import plural
from ..config.file import drops_labels, known
from ..config.policy import Policy
from ..config.sample import SampleArgs
from ..data.pixels import QUANTIZE
from ..files import digest
from ..moe.policy import Steered
from ..pipeline import DiTMoEPipeline, load, shift_option
from ..pipeline.guide import EXPERTS_OFF, NONE, ExpertsOff
from ..run_folder.network import load_guide
from .draw import RequestedSet, balanced_labels
from .pictures import write_grid
from .set_files import Processes, write_folder, write_npz
from .speed import ALWAYS_RUN, batch_size, blocks_run, prepare

PIPELINE_OPTIONS = ("eta", "guidance_interval", "guidance_channels", "guidance_rule", "epsilon_scale")


def run(args: SampleArgs, processes: Processes, score: Callable[[dict[str, Any] | Path], None] | None = None) -> None:
    """What `sample.py` does: load, draw, write, score, say where. `processes` share the work.

    `score` scores a set as it is drawn, or the file or folder it was written to. Raises ValueError for a model that
    cannot be loaded, a value that does not fit it, or an output that exists.
    """
    out = args.place
    kind = "" if out is None else out.suffix.lower()
    images = requested(args)
    if images.are_latents and (score or kind != ".png"):  # the grid is there to look at them
        what = f"{args.model} makes latents of {images.shape[-1]} channels and holds no VAE to decode them"
        raise ValueError(f"{what}; give it one: python -m ditmoe export RUN FOLDER --vae PATH, or convert")
    if score and kind == ".png":
        raise ValueError(f"out {out}: a scored set goes to an .npz file or a folder; without --out nothing is kept")
    if out is None:
        assert score is not None
        labels = None if images.labels is None else np.asarray(images.labels, np.int64)

        # the score has a batch size of its own
        def read(limit: int, _: int, rank: int, world: int) -> Iterator[Any]:
            return images.read(limit, images.batch_size, rank, world)

        return score({
            "kind": "model", "path": str(args.model), "count": images.num, "shape": images.shape, "read": read,
            "labels": labels, "facts": facts(args, images),
        })  # fmt: skip
    if kind != ".png":
        write = write_npz if kind == ".npz" else write_folder
        write(images, facts(args, images), out, processes)
    elif processes.rank == 0:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_grid(images.whole(images.batch_size), images.labels, images.pipe.id2label, out)
        except OSError as error:
            raise ValueError(f"out {out} could not be written ({error.strerror or error})") from error
    if processes.rank == 0:
        steps, calls = plural(images.sampler["steps"], "step"), plural(images.sampler["nfe"], "network call")
        what = f"{images.sampler['name']}, {steps}, {calls} an image"
        if args.cache is not None:
            what += f", {blocks_run(args.cache, images.sampler['steps'])} of them through the blocks"
        print(f"{plural(images.num, 'image')} in {out} ({what})", flush=True)
    if score:
        score(out)


def requested(args: SampleArgs, pipe: DiTMoEPipeline | None = None) -> RequestedSet:
    """The set that a command line asks for, of its model, which may be loaded already."""
    pipe = load(args.model, fast=True, cached_experts=args.cached_experts) if pipe is None else pipe
    num = len(args.classes) if args.classes else args.num or 8 * min(max(len(pipe.id2label), 1), 20)
    note_numbers(pipe, args.classes or ())
    labels = balanced_labels(pipe, num) if args.classes is None else pipe.get_label_ids(args.classes)
    name, steps = args.sampler or pipe.config.sampler, args.steps or pipe.config.num_inference_steps
    cfg = args.cfg if args.cfg is not None or labels is None else pipe.config.guidance_scale
    note_no_dropout(args, labels)
    more, of_sampler = {option: getattr(args, option) for option in PIPELINE_OPTIONS}, args.sampler_options()
    of_sampler |= shift_option(name, args.flow_shift)
    scheduler = pipe.scheduler_for(name, steps, of_sampler)
    guide = args.guide if args.guide in (None, NONE, EXPERTS_OFF) else load_guide(Path(args.guide), pipe)
    guided, scale = pipe.guide_for(guide, args.guide_scale)
    asked, timesteps = more["guidance_interval"], scheduler.timesteps
    more["guidance_interval"] = pipe.interval_for(asked, 1.0 if cfg is None else cfg, scale, timesteps)
    more["guidance_channels"] = pipe.channels_for(more["guidance_channels"], 1.0 if cfg is None else cfg, scale)
    policy = None if args.policy is None else Policy.read(args.policy)
    options = {
        "sampler": name, "num_inference_steps": steps, "guidance_scale": cfg, "seed": args.seed, **more,
        "sampler_options": of_sampler, "guide": guide, "guide_scale": args.guide_scale, "tau": args.tau_spans(),
        "policy": policy,
    }  # fmt: skip
    noted = {
        "name": name or type(pipe.scheduler).__name__,
        "steps": steps,
        "nfe": len(scheduler.timesteps),
        "cfg": cfg,
        **more,
        **of_sampler,
    }
    noted |= {} if guided is None else {"guide_scale": scale}
    noted |= {} if args.tau is None else {"tau": args.tau_spans()}
    noted |= {"policy": policy.to_dict()["rules"]} if policy is not None and policy.rules else {}
    Steered(pipe.transformer, policy, args.tau_spans(), len(scheduler.timesteps))  # refused before a folder is made
    if args.cache is not None and len(scheduler.timesteps) != steps:
        raise ValueError(f"cache is {args.cache}, but {name} calls the network more than once a step; leave it out")
    if args.cache is not None and steps <= ALWAYS_RUN:
        what = f"cache is {args.cache}, which does nothing in {steps} steps, as the first {ALWAYS_RUN} are always run"
        raise ValueError(f"{what}; leave it out, or give --steps {ALWAYS_RUN + 1} or more")
    some: list[Any] = [] if policy is None else [rule for rule in policy.rules if rule.steps is not None]
    some += [span for span in args.tau_spans() or () if span[:2] != (0.0, 1000.0)]
    if args.cache is not None and some:
        raise ValueError(f"cache is {args.cache}, which leaves steps out; policy and tau must then be for all of them")
    noted |= _time_shift(scheduler)
    made = {"guide": _guide(args, guided)} | prepare(pipe, guided, args)
    size = args.batch_size or batch_size(pipe)
    return RequestedSet(pipe, labels, num, options, noted, size, made, filled=args.compile and num > size)


def note_numbers(pipe: DiTMoEPipeline, classes: Sequence[int | str]) -> None:
    """Say where a label that is asked for is the name of another class."""
    named = {name: label for label, name in pipe.id2label.items()}
    for label in classes:
        if isinstance(label, int) and (other := named.get(str(label), label)) != label:
            asked = f"classes has {label}: the class of that label is {pipe.id2label.get(label, 'not there')!r}"
            print(f"note: {asked}, and the one of that name has label {other}", flush=True)


def note_no_dropout(args: SampleArgs, labels: Sequence[int] | None) -> None:
    """Say where a guidance is asked for that goes by an answer without labels which the run did not train."""
    if labels is not None and args.cfg not in (None, 1.0) and not drops_labels(args.model):
        trained = "its run trained no answer without labels, which guidance goes by (objective.class_dropout_prob 0)"
        print(f"note: cfg is {args.cfg}, but {trained}; --cfg 1 draws without it", flush=True)


def facts(args: SampleArgs, images: RequestedSet) -> dict[str, Any]:
    """What makes the images, as JSON values; it goes into the report of a score."""
    pipe, labels = images.pipe, images.labels
    drawn = "none" if labels is None else "balanced"
    found = {
        **_trained(args.model),
        "vae": None if pipe.vae is None else getattr(pipe.vae.config, "_name_or_path", "unknown"),
        "sampler": images.sampler,
        "seed": args.seed,
        "label_sampling": drawn if args.classes is None else "given",
        "labels_sha256": None if labels is None else hashlib.sha256(repr(labels).encode()).hexdigest(),
        "num": images.num,
        "quantize": QUANTIZE,
        **images.made,
        "device": pipe.device.type,
    }
    return dict(json.loads(json.dumps(found)))


def _guide(args: SampleArgs, guide: Any) -> dict[str, Any] | str | None:
    """Who guides, beside `guide_scale` of the sampler: a hash of its settings and weights, wherever they lie."""
    if guide is None or isinstance(guide, ExpertsOff):
        return None if guide is None else EXPERTS_OFF
    settings = {name: value for name, value in guide.config.items() if not name.startswith("_")}
    content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(guide.state_dict().items()):
        content.update(name.encode() + value.cpu().numpy().tobytes())
    return {"path": args.guide or str(args.model), "sha256": content.hexdigest()}


def _time_shift(scheduler: Any) -> dict[str, Any]:
    """What a `ts-*` goes by, the window being that of its steps; nothing of other samplers."""
    found = {field: value for field, value in scheduler.config.items() if field.startswith("exposure_")}
    if found:
        found["exposure_variance"] = found["exposure_variance"] or "published"  # which is a variance of 0
        found["exposure_window"] = scheduler.window
    return found


def _trained(model: Path) -> dict[str, Any]:
    """Path and steps of a model, a hash of its weights and settings, scheduler and VAE included; and its average's."""
    folder = model if (model / "model_index.json").is_file() else model / "model"
    content = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            content.update(file.relative_to(folder).as_posix().encode() + bytes.fromhex(digest(file)))
    file, config = folder.parent / "config.json", known(model)
    going_on = file.is_file() and file.stat().st_mtime > (folder / "model_index.json").stat().st_mtime
    steps = None if config is None or going_on else config.max_steps  # a longer run has begun: the file is ahead
    checkpoint = {"path": str(model), "steps": steps, "sha256": content.hexdigest()}
    return {"checkpoint": checkpoint, "ema_decay": None if config is None else float(config.train.ema_decay)}

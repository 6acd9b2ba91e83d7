"""What a run leaves and goes on from: checkpoints out and in, pipelines to sample with, also of a split state."""

import os
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import pipeline
from ..config.file import to_dict
from ..config.sections import Config
from ..data.sets import ImageSet
from ..launch import agree
from ..model import DiTMoETransformer2DModel, build
from ..pipeline import DiTMoEPipeline
from ..run_folder import checkpoint
from ..run_folder.place import CHECKPOINTS, MODEL
from ..run_folder.writer import Writer
from .parallel import Parallel
from .state import Fake, State, num_classes

# Settings of a network that the same weights may have in another run; the others say what weights are.
_FREE = {
    "backend", "jitter", "router_tau", "router_capacity", "router_overflow", "router_top_groups", "other_sizes",
}  # fmt: skip


class Saving:
    """Writes checkpoints in the background and assembles pipelines. All processes call every method, and leave it.

    `variance` (`ditmoe.data.open.pixel_variance`) is for the pipeline; `step` is that of the checkpoint that the state
    came from, -1 for none.
    """

    def __init__(
        self, config: Config, data: ImageSet, parallel: Parallel, state: State, variance: float, step: int
    ) -> None:
        self.config, self.data, self.accelerator = config, data, parallel.accelerator
        self.parallel, self.state, self.variance, self._last = parallel, state, variance, step
        token = agree.decided_by_first(parallel.accelerator, lambda: str(os.getpid()))
        root, keep, tolerant = config.out / CHECKPOINTS, config.train.keep, config.train.on_save_error == "continue"
        self._writer = Writer(root, keep, tolerant=tolerant, token=token, shard=parallel.rank, shards=parallel.writers)

    def __exit__(self, *exception: object) -> None:
        self._writer.__exit__(*exception)

    def checkpoint(self, step: int, facts: dict[str, Any], *, wait: bool) -> None:
        """Save the state as of a step; with `wait`, return when it is on the disk. Raises as `Writer.save`."""
        if step != self._last and self.parallel.rank < self.parallel.writers:
            whole, split = self.parallel.saved(to_parts(self.state))
            self._writer.save(step, whole, {"config": to_dict(self.config), **facts}, split, wait=False)
        self._last = step
        if wait:
            self._writer.finish()
            self.accelerator.wait_for_everyone()

    def pipeline(self, step: int) -> pipeline.DiTMoEPipeline | None:
        """The pipeline of the averaged weights, whole, on the first process; None on the others."""
        model = self.state.ema
        if self.parallel.splits:
            whole = self.parallel.gathered(model.state_dict())
            if self.parallel.rank:
                return None
            model = build(self.config, num_classes(self.config, self.data)).eval().requires_grad_(False)
            model.load_state_dict(whole)
        return self._assemble(model, step)

    def export(self, step: int) -> None:
        """Write model/ with the averaged weights. Of split experts one block is whole at a time."""
        lots = self._lots() if self.parallel.splits else None
        if self.parallel.rank == 0:
            with torch.device("meta"):
                empty = build(self.config, num_classes(self.config, self.data))
            pipeline.save(self._assemble(empty if lots else self.state.ema.cpu(), step), self.config.out / MODEL, lots)
        else:
            deque(lots or (), maxlen=0)
        self.accelerator.wait_for_everyone()

    def _assemble(self, model: DiTMoETransformer2DModel, step: int) -> DiTMoEPipeline:
        """With the latents' statistics of the data that were opened: the folder may be another one by now."""
        data = self.data
        return pipeline.assemble(model, self.config, data.id2label, self.variance, step, data.normalization)

    def _lots(self) -> Iterator[dict[str, Tensor]]:
        """The averaged weights, a block at a time, whole on the first process."""
        lots: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in self.state.ema.state_dict().items():
            lots[".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""][name] = value
        return map(self.parallel.gathered, lots.values())


def to_parts(state: State) -> dict[str, dict[str, Tensor]]:
    """All that learns as named tensors: "model", "ema" and the moments of the "optimizer"; "fake" and its moments."""
    parts = {"ema": state.ema.state_dict()}
    for name, moments, (model, optimizer) in _moved(state):
        names, entries = {p: n for n, p in model.named_parameters()}, optimizer.state.items()
        parts[name] = model.state_dict()
        parts[moments] = {f"{names[p]}.{kind}": torch.as_tensor(v) for p, entry in entries for kind, v in entry.items()}
    return parts


def _moved(state: State) -> list[tuple[str, str, Fake]]:
    """The networks that optimisers move: names of the parts of a checkpoint, network and optimiser."""
    found = [("model", "optimizer", Fake(state.model, state.optimizer))]
    return found if state.fake is None else [*found, ("fake", "fake_optimizer", state.fake)]


def newest(root: Path, parallel: Parallel) -> Path | None:
    """The newest whole checkpoint of a folder, None of none. Each process reads a share of the files.

    Raises:
        ValueError: Checkpoints are there but none is whole on every process.
    """
    accelerator, rank = parallel.accelerator, parallel.rank

    def fault_of(path: Path) -> str | None:
        fault = checkpoint.find_fault(path, (rank, parallel.world))
        found = agree.everything(accelerator, [fault and f"{fault}, as process {rank} sees it" if rank else fault])
        return next((fault for fault in found if fault), None)

    candidates = agree.decided_by_first(accelerator, lambda: checkpoint.newest_first(root))
    return checkpoint.first_whole(candidates, fault_of, accelerator.print)


class Opened(NamedTuple):
    """A whole checkpoint: its tensors, which are read when they are asked for, and its saved values."""

    path: Path
    parts: dict[str, dict[str, checkpoint.Saved]]
    values: dict[str, Any]


def opened(path: Path, facts: dict[str, Any]) -> Opened:
    """A whole checkpoint. ValueError: It is of other data, or other teachers."""
    parts, meta = checkpoint.opened(path)
    lacking = [name for name in ("step", *facts) if name not in meta and name != "teachers"]
    if lacking:
        raise ValueError(f"{path / 'state.json'} lacks {', '.join(lacking)}; move the checkpoint away")
    if meta["data"] != facts["data"]:
        other = f"the one that {path} was trained on (other images, order, weights, classes or VAE)"
        raise ValueError(f"the data set is not {other}; restore it, or give another --out")
    if facts.get("teachers", []) not in (None, meta.get("teachers", [])):
        raise ValueError(f"distill.teachers are not those of {path}; restore them, or give another --out")
    return Opened(path, parts, meta)


def resume(found: Opened, state: State, facts: dict[str, Any], parallel: Parallel) -> None:
    """Load a checkpoint into the state, which is touched only when all of it fits. ValueError: Of another network."""
    path, meta, parts = found.path, found.values, parallel.own(found.parts)
    wrong = _mismatches(parts, state, moved=meta["step"] > meta.get("skipped_steps", 0))
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} is of another network: {'; '.join(wrong[:5])}{more}; give another --out")
    for name in ("precision", "num_processes"):
        if meta[name] != facts[name]:
            print(f"note: {name} was {meta[name]} and is now {facts[name]}; results may differ in the last digits")
    state.ema.load_state_dict(parts["ema"])
    for own, moments, (model, optimizer) in _moved(state):
        model.load_state_dict(parts[own])
        parameters = dict(model.named_parameters())
        for key, value in parts.get(moments, {}).items():
            name, moment = key.rsplit(".", 1)
            optimizer.state[parameters[name]][moment] = value.to(parameters[name].device)


def begin(folder: Path | None, state: State, parallel: Parallel) -> None:
    """Give a new state, network and average, the weights of the model at a folder; None leaves it as it is.

    Raises:
        ValueError: There is no model, or it is of another network, in its settings or its tensors.
    """
    if folder is None:
        return
    net, ours = pipeline.load(folder).transformer, state.model.config
    named = sorted(name for name in ours.keys() - _FREE if not name.startswith("_"))
    other = [f"{n} is {net.config[n]} there and {ours[n]} here" for n in named if net.config[n] != ours[n]]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        raise ValueError(f"train.init {folder} is another network: {'; '.join(other[:5])}{more}")
    saved = {name: checkpoint.Saved([value]) for name, value in net.state_dict().items()}
    for target in (state.model, state.ema):
        target.load_state_dict(parallel.own({"model": saved})["model"])


def _mismatches(parts: dict[str, dict[str, Tensor]], state: State, *, moved: bool) -> list[str]:
    """What a checkpoint's tensors are and the state's are not, in words. An optimiser that has `moved` has moments."""
    want = {f"ema {n}": v for n, v in state.ema.state_dict().items()}
    for own, part, (model, optimizer) in _moved(state):
        want |= {f"{own} {n}": v for n, v in model.state_dict().items()}
        muons = {p for group in optimizer.param_groups if "parts" in group for p in group["params"]}
        for name, parameter in model.named_parameters() if moved or (own == "fake" and parts.get(part)) else ():
            moments = ("momentum",) if parameter in muons else ("exp_avg", "exp_avg_sq")
            want |= {f"{part} {name}.{moment}": parameter.detach() for moment in moments}
            want[f"{part} {name}.step"] = torch.zeros(())
    found = {f"{part} {n}": v for part, tensors in parts.items() for n, v in tensors.items()}
    wrong = [f"{name} is missing" for name in want.keys() - found.keys()]
    wrong += [f"{name} is not known" for name in found.keys() - want.keys()]
    for name in want.keys() & found.keys():
        a, b = found[name], want[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            wrong.append(f"{name} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
    return sorted(wrong)

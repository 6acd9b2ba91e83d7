"""What a run leaves: checkpoints to go on from and pipelines to sample with, also of a state that is split."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, pipeline, ranks
from .config import Config, to_dict
from .data import ImageSet
from .latent_sets import LatentShards, normalization_of
from .model import DiTMoETransformer2DModel, build
from .parallel import Parallel, expert_names
from .pipeline import DiTMoEPipeline
from .state import State, num_classes, to_parts


class Saving:
    """Writes checkpoints in the background and assembles pipelines. All processes call every method.

    Args:
        config: The run.
        data: Its training images, for the names of the classes.
        parallel: Who holds what.
        state: What learns.
        variance: `ditmoe.data.pixel_variance`, for the pipeline.
        step: The step of the checkpoint that the state came from; -1 for none.
    """

    def __init__(
        self,
        config: Config,
        data: ImageSet,
        parallel: Parallel,
        state: State,
        variance: float,
        step: int,
    ) -> None:
        self.config, self.data, self.accelerator = config, data, parallel.accelerator
        self.parallel, self.state, self.variance, self._last = parallel, state, variance, step
        self._experts = expert_names(state.ema)
        self._writer: Writer | None = None

    def __enter__(self) -> Saving:
        token = ranks.decided_by_first(self.accelerator, lambda: str(os.getpid()))
        if self.parallel.rank < self.parallel.writers:
            self._writer = Writer(
                self.config.out / "checkpoints",
                self.config.train.keep,
                tolerant=self.config.train.on_save_error == "continue",
                token=token,
                shard=self.parallel.rank,
                shards=self.parallel.writers,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.__exit__(*exception)

    def checkpoint(self, step: int, facts: dict[str, Any], *, wait: bool) -> None:
        """Save the state as of a step; with `wait`, return when it is on the disk. Raises as `Writer.save`."""
        if self._writer and step != self._last:
            whole, split = self.parallel.saved(to_parts(self.state), self.state.model)
            self._writer.save(step, whole, {"config": to_dict(self.config), **facts}, split, wait=False)
        self._last = step
        if wait:
            if self._writer:
                self._writer.finish()
            self.accelerator.wait_for_everyone()

    def pipeline(self, step: int) -> pipeline.DiTMoEPipeline | None:
        """The pipeline of the averaged weights, whole, on the first process; None on the others."""
        model = self.state.ema
        if self.parallel.splits:
            whole = {name: self._whole(name, value) for name, value in self.state.ema.state_dict().items()}
            if not self.accelerator.is_main_process:
                return None
            model = build(self.config, num_classes(self.config, self.data)).eval().requires_grad_(False)
            model.load_state_dict(whole)
        return self._assemble(model, step)

    def export(self, step: int) -> None:
        """Write model/ with the averaged weights. Of split experts one block is whole at a time."""
        first, folder = self.accelerator.is_main_process, self.config.out / "model"
        if not self.parallel.splits:
            if first:
                pipeline.save(self._assemble(self.state.ema.cpu(), step), folder)
        elif first:
            with torch.device("meta"):
                empty = build(self.config, num_classes(self.config, self.data))
            pipeline.save(self._assemble(empty, step), folder, self._lots())
        else:
            for _ in self._lots():
                pass
        self.accelerator.wait_for_everyone()

    def _assemble(self, model: DiTMoETransformer2DModel, step: int) -> DiTMoEPipeline:
        """With the latents' statistics of the data that were opened: the folder may be another one by now."""
        latents = normalization_of(self.data.index) if isinstance(self.data, LatentShards) else None
        return pipeline.assemble(model, self.config, self.data.id2label, self.variance, step, latents)

    def _lots(self) -> Iterator[dict[str, Tensor]]:
        """The averaged weights, a block at a time, whole on the first process."""
        lots: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in self.state.ema.state_dict().items():
            lots[".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""][name] = value
        for lot in lots.values():
            yield {name: whole for name, value in lot.items() if (whole := self._whole(name, value)) is not None}

    def _whole(self, name: str, value: Tensor) -> Tensor | None:
        return self.parallel.gathered(value, expert=name in self._experts)


class Writer:
    """Writes checkpoints in a thread of its own while training goes on, one at a time.

    Args:
        root: The folder of checkpoints; made when missing. Leftovers of interrupted saves are removed.
        keep: Newest checkpoints to keep, see `checkpoint.prune`.
        tolerant: Say so and go on where a checkpoint cannot be written, instead of raising OSError.
        token: The same on all processes that write together, another one in every run of the program.
        shard: Which slice of split tensors this process writes; 0 also writes everything else and ends the save.
        shards: How many there are.
    """

    def __init__(
        self, root: Path, keep: int, *, tolerant: bool, token: str = "", shard: int = 0, shards: int = 1
    ) -> None:
        self.root, self.keep, self.tolerant = root, keep, tolerant
        self.token, self.shard, self.shards = token or str(os.getpid()), shard, shards
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._whole: list[Path] = []  # those that were read back
        self._given_up = threading.Event()  # no other process is to be waited for any more
        if shard == 0:
            checkpoint.remove_unfinished(root)

    def save(
        self,
        step: int,
        parts: checkpoint.Parts,
        state: Mapping[str, Any],
        split: checkpoint.Parts | None = None,
        *,
        wait: bool,
    ) -> None:
        """Copy the tensors, then write them in the background; with `wait`, return when they are on the disk.

        `parts` and `state` are those of all processes, `split` this one's slices.

        Raises:
            OSError: The one before could not be written, unless tolerant; with `wait` neither could this one.
            FloatingPointError: See `checkpoint.save`.
        """
        try:
            self.finish()
        except OSError as error:
            if not self.tolerant:
                raise
            print(f"warning: a checkpoint could not be written ({error}); trying again now", flush=True)
        copies = {part: {k: _copied(v) for k, v in tensors.items()} for part, tensors in parts.items()}
        slices = {part: {k: _copied(v) for k, v in tensors.items()} for part, tensors in (split or {}).items()}
        self._pending = self._thread.submit(self._write, step, copies, state, slices)
        if self.shard == 0:
            self._thread.submit(self._prune, self._pending)  # `finish` does not wait for it, leaving does
        if wait:
            self.finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._given_up.set()
        self._thread.shutdown(wait=True)
        if self.shard == 0 and self.shards > 1:
            checkpoint.remove_unfinished(self.root)

    def finish(self) -> None:
        """Wait for the last one. Raises what it met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, parts: checkpoint.Parts, state: Mapping[str, Any], split: checkpoint.Parts) -> None:
        named = {f"{part}.shard-{self.shard}": tensors for part, tensors in split.items()}
        if self.shard == 0 and self.shards > 1:
            checkpoint.remove_unfinished(self.root)  # the last one, if it failed
        if self.shard:
            checkpoint.write_shard(self.root, step, named, self.token, self._given_up)
            return
        others = [f"{part}.shard-{n}" for part in split for n in range(1, self.shards)]
        more: dict[str, Any] = {"token": self.token, "others": others, "given_up": self._given_up}
        checkpoint.save(self.root, step, {**parts, **named}, state, **more)
        (self.root.parent / checkpoint.MARK).touch()

    def _prune(self, written: Future[None]) -> None:
        if written.exception() is not None:
            return
        try:
            whole = checkpoint.prune(self.root, self.keep, self._whole)
        except OSError as error:
            print(f"warning: an older checkpoint could not be removed ({error})", flush=True)
        else:
            self._whole = whole if self.shards > 1 else []  # what many wrote is too large to be read at every save


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)

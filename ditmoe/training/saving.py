"""What a run leaves: checkpoints to go on from and pipelines to sample with, also of a state that is split."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import pipeline
from ..config.file import to_dict
from ..config.sections import Config
from ..data.sets import ImageSet
from ..launch import agree
from ..model import DiTMoETransformer2DModel, build
from ..pipeline import DiTMoEPipeline
from ..run_folder.writer import Writer
from .parallel import Parallel, expert_names
from .state import State, num_classes, to_parts


class Saving:
    """Writes checkpoints in the background and assembles pipelines. All processes call every method.

    Args:
        config: The run.
        data: Its training images, for the names of the classes.
        parallel: Who holds what.
        state: What learns.
        variance: `ditmoe.data.open.pixel_variance`, for the pipeline.
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
        token = agree.decided_by_first(self.accelerator, lambda: str(os.getpid()))
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
        data = self.data
        return pipeline.assemble(model, self.config, data.id2label, self.variance, step, data.normalization)

    def _lots(self) -> Iterator[dict[str, Tensor]]:
        """The averaged weights, a block at a time, whole on the first process."""
        lots: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in self.state.ema.state_dict().items():
            lots[".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""][name] = value
        for lot in lots.values():
            yield {name: whole for name, value in lot.items() if (whole := self._whole(name, value)) is not None}

    def _whole(self, name: str, value: Tensor) -> Tensor | None:
        return self.parallel.gathered(value, expert=name in self._experts)

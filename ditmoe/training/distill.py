"""Distillation: what frozen teachers say is the target, at every noise level or, for few calls, a step further.

Of several specialists one student (the purpose of Meta-DMoE, arXiv 2210.03885), repair of a network that was cut,
guidance in one pass (Meng et al. 2023, arXiv 2210.03142), and few calls: from noise on, each step of the student's
sampler lands where the teacher's sampler gets by many (Luhman and Luhman, arXiv 2101.02388, with steps between).

Shapes: n images of a micro-batch, C channels, H W size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import pipeline
from ..config.sections import Config
from ..data.sets import ImageSet
from ..files import digest
from ..model import DiTMoETransformer2DModel
from ..objective import NUM_TIMESTEPS
from ..pipeline.answers import ONE_CALL, Answers, path, words


class Teachers:
    """The frozen teachers of a run, on a device.

    `levels` are a student's of few calls: the noise levels of its K steps, 1 first, and 0; None: it is asked at all.

    Raises:
        ValueError: A teacher is no model, one of other images, classes or latents, or of a sampler that few calls
            cannot follow.
    """

    def __init__(self, config: Config, data: ImageSet, student: DiTMoETransformer2DModel, device: torch.device) -> None:
        self.distill = distill = config.distill
        scheduler = words(
            config.objective, config.sample.flow_shift if distill.teacher_steps else None, config.sample.steps
        )
        self.levels = tuple(scheduler.sigmas.tolist()) if distill.teacher_steps else None
        pipes = [pipeline.load(Path(folder)) for folder in distill.teachers]
        self.null_label, self.pipes, self.answers = student.null_label, list[Any](), list[Answers]()
        self.first: list[int] = []  # the student's label of its label 0
        classes, counts = student.config.num_classes, [pipe.transformer.config.num_classes for pipe in pipes]
        # of a mixture the student has a set's classes after those of the sets before it, one of a set without any
        own = [max(1, count) for count in counts]
        for folder, pipe in zip(distill.teachers, pipes, strict=True):
            net = pipe.transformer.config
            for name in ("sample_size", "in_channels"):
                if net[name] != student.config[name]:
                    raise ValueError(
                        f"distill.teachers {folder} has {name} {net[name]}, the student {student.config[name]}"
                    )
            if pipe.config.latents != data.normalization:
                raise ValueError(f"distill.teachers {folder} is of other latents than the data (or one is of pixels)")
            self.first.append(0 if counts[len(self.first)] == classes else sum(own[: len(self.first)]))
            if self.levels is not None and pipe.config.sampler not in ONE_CALL:
                raise ValueError(
                    f"distill.teachers {folder} draws by {pipe.config.sampler}, which few calls cannot follow; "
                    f"distill.teacher_steps needs one of {', '.join(ONE_CALL)}"
                )
            pipe.set_progress_bar_config(disable=True)
            self.pipes.append(pipe.to(device))
            self.answers.append(Answers(pipe, scheduler, guided=distill.guided))
        if any(count != classes for count in counts) and (distill.by != "domain" or sum(own) != classes):
            raise ValueError(f"distill.teachers have {' and '.join(map(str, counts))} classes, the student {classes}")

    @property
    def calls(self) -> int:
        """K of a student of few calls, else 1: rows that an image gives."""
        return len(self.levels) - 1 if self.levels else 1

    def target(self, x_t: Tensor, t: Tensor, labels: Tensor | None, domain: Tensor) -> Tensor:
        """What the student should say, (n, C, H, W) float32, of x_t at t (n,).

        labels (n,) are the student's, domain (n,) the numbers of the images' sets.
        """

        def of(number: int, rows: Tensor | slice) -> Tensor:
            own = None if labels is None else labels[rows]
            return self.answers[number](x_t[rows], t[rows], self._own(number, own))

        return self._by(of, domain)

    def steps(self, noise: Tensor, labels: Tensor | None, domain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of few calls, with x (n, C, H, W) at s = 1: (x_t, t, target) of all K steps, each K n long, step by step."""
        assert self.levels is not None
        levels, M = self.levels, self.distill.teacher_steps

        def of(number: int, rows: Tensor | slice) -> Tensor:
            own = self._own(number, None if labels is None else labels[rows])
            return path(self.pipes[number], noise[rows], own, M, levels).transpose(0, 1)

        x = self._by(of, domain).transpose(0, 1)  # (K + 1, n, C, H, W)
        s = torch.tensor(levels, device=x.device)
        target = (x[1:] - x[:-1]) / (s[1:] - s[:-1]).view(-1, 1, 1, 1, 1)
        return x[:-1].flatten(0, 1), (NUM_TIMESTEPS * s[:-1]).repeat_interleave(len(noise)), target.flatten(0, 1)

    def _by(self, of: Callable[[int, Tensor | slice], Tensor], domain: Tensor) -> Tensor:
        """What the teachers say, each of its set or the mean of all; `of` asks one about some of the images."""
        if self.distill.by == "mean":
            return torch.stack([of(number, slice(None)) for number in range(len(self.answers))]).mean(dim=0)
        known = [(domain == number, of(number, domain == number)) for number in domain.unique().tolist()]
        said = torch.empty(len(domain), *known[0][1].shape[1:], device=domain.device)
        for rows, own in known:
            said[rows] = own
        return said

    def _own(self, number: int, labels: Tensor | None) -> Tensor | None:
        """A teacher's labels, of the student's."""
        null = self.answers[number].null_label
        if labels is None or null is None:
            return None
        assert self.null_label is not None
        return torch.where(labels == self.null_label, null, labels - self.first[number])


def teachers_of(
    config: Config, data: ImageSet, student: DiTMoETransformer2DModel, device: torch.device
) -> Teachers | None:
    """The teachers of a run, None where it has none; see `Teachers`."""
    return Teachers(config, data, student, device) if config.distill.teachers else None


def facts(config: Config) -> dict[str, list[str]]:
    """What the teachers' weights are, file by file: a run goes on with the same ones. Empty without teachers."""
    found = []
    for folder in config.distill.teachers:
        place = next(p for p in (Path(folder) / "model", Path(folder)) if (p / "model_index.json").is_file())
        found += [digest(path) for path in sorted(place.rglob("*.safetensors"))]
    return {"teachers": found} if found else {}

"""Distillation: what frozen teachers say is the target, at every noise level or, for few calls, a step further.

Of several specialists one student (the purpose of Meta-DMoE, arXiv 2210.03885), repair of a network that was cut,
guidance in one pass (Meng et al. 2023, arXiv 2210.03142), and few calls: a step of the student's sampler lands where
several of the teachers' path do (progressive distillation, Salimans and Ho, arXiv 2202.00512, in one stage).

Shapes: n images of a micro-batch, C channels, H W size.
"""

from pathlib import Path

import torch
from torch import Tensor

from .. import pipeline
from ..config.sections import Config
from ..data.sets import ImageSet
from ..files import digest
from ..model import DiTMoETransformer2DModel
from ..objective import NUM_TIMESTEPS
from ..pipe.answers import Answers, one_step, words


class Teachers:
    """The frozen teachers of a run, on a device.

    `levels` (K,) are the times at which a student of few calls is asked, from noise on; None: at all.

    Raises:
        ValueError: A teacher is no model, or one of other images, classes or latents.
    """

    def __init__(self, config: Config, data: ImageSet, student: DiTMoETransformer2DModel, device: torch.device) -> None:
        self.distill = distill = config.distill
        self.path: Tensor | None = None  # (K, M + 1) noise levels, a row a call
        self.levels: Tensor | None = None
        scheduler = words(config.objective)
        if distill.teacher_steps:
            scheduler = words(config.objective, config.sample.flow_shift, config.sample.steps * distill.teacher_steps)
            self.path = scheduler.sigmas.unfold(0, distill.teacher_steps + 1, distill.teacher_steps)
            self.levels = NUM_TIMESTEPS * self.path[:, 0]
        pipes = [pipeline.load(Path(folder)) for folder in distill.teachers]
        self.null_label, self.answers = student.null_label, list[Answers]()
        self.first: list[int] = []  # the student's label of its label 0
        classes, counts = student.config.num_classes, [pipe.transformer.config.num_classes for pipe in pipes]
        # of a mixture the student has a set's classes after those of the sets before it, one of a set without any
        own = [max(1, count) for count in counts]
        if any(count != classes for count in counts) and (distill.by != "domain" or sum(own) != classes):
            raise ValueError(f"distill.teachers have {' and '.join(map(str, counts))} classes, the student {classes}")
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
            self.answers.append(Answers(pipe.to(device), scheduler, guided=distill.guided))

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, labels: Tensor | None, domain: Tensor) -> Tensor:
        """What the student should say, (n, C, H, W) float32, of x_t at t (n,), one of `levels` if there are any.

        labels (n,) are the student's, domain (n,) the numbers of the images' sets.
        """
        if self.distill.by == "domain":
            target = torch.empty_like(x_t, dtype=torch.float32)
            for number in domain.unique().tolist():
                rows = domain == number
                target[rows] = self._of(number, x_t[rows], t[rows], None if labels is None else labels[rows])
            return target
        return torch.stack([self._of(number, x_t, t, labels) for number in range(len(self.answers))]).mean(dim=0)

    def _of(self, number: int, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        answer, first = self.answers[number], self.first[number]
        if labels is None or answer.null_label is None:
            labels = None
        else:
            assert self.null_label is not None
            labels = torch.where(labels == self.null_label, answer.null_label, labels - first)
        if self.path is None or self.levels is None:
            return answer(x_t, t, labels)
        call = (t.cpu().double()[:, None] - self.levels).abs().argmin(dim=1)
        s = self.path[call].T
        return one_step(lambda x, t: answer(x, t, labels), x_t, s, midpoint=self.distill.solver == "midpoint")


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

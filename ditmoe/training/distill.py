"""Distillation: what frozen teachers say is the target, at every noise level or, for few calls, a step further.

Of several specialists one student (the purpose of Meta-DMoE, arXiv 2210.03885), repair of a network that was cut,
guidance in one pass (Meng et al. 2023, arXiv 2210.03142), and few calls: from noise on, each step of the student's
sampler lands where the teacher's sampler gets by many (Luhman and Luhman, arXiv 2101.02388, with steps between).

Shapes: n images of a micro-batch, C channels, H W size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import pipeline
from ..config.file import drops_labels
from ..config.sections import Config
from ..data.mixture import Mixture
from ..data.sets import ImageSet
from ..files import digest
from ..model import DiTMoETransformer2DModel
from ..objective import NUM_TIMESTEPS
from ..pipeline.answers import ONE_CALL, Answers, calls_of, flow_levels, path, words


class Teachers:
    """The frozen teachers of a run, on a device.

    `levels` are a student's of few calls: the noise levels of its K steps, 1 first, and 0; None: it is asked at all.

    Raises:
        ValueError: A teacher is no model, one of other images, classes or latents, or of a sampler that few calls
            cannot follow.
    """

    def __init__(self, config: Config, data: ImageSet, student: DiTMoETransformer2DModel, device: torch.device) -> None:
        self.distill = distill = config.distill
        few = distill.teacher_steps > 0
        self.levels = flow_levels(config.sample.flow_shift, config.sample.steps) if few else None
        self.pipes = [pipeline.load(Path(folder)) for folder in distill.teachers]
        if distill.cfg is not None and not any(pipe.transformer.config.num_classes for pipe in self.pipes):
            raise ValueError(f"distill.cfg is {distill.cfg}, and the teachers know no classes; leave it out")
        self.null_label, self.answers = student.null_label, list[Answers]()
        for folder, pipe in zip(distill.teachers, self.pipes, strict=True):
            net = pipe.transformer.config
            for name in ("sample_size", "in_channels"):
                if net[name] != student.config[name]:
                    raise ValueError(
                        f"distill.teachers {folder} has {name} {net[name]}, the student {student.config[name]}"
                    )
            if distill.fake_steps and (net.prediction_type, net.expert_storage) != ("flow_prediction", "float"):
                kind = f"{net.prediction_type}, its experts in {net.expert_storage}"
                raise ValueError(
                    f"distill.teachers {folder} is of {kind}; a copy of it is to learn, for distill.fake_steps, "
                    f"which takes a flow whose experts are in float"
                )
            if pipe.config.latents != data.normalization:
                raise ValueError(f"distill.teachers {folder} is of other latents than the data (or one is of pixels)")
            calls = calls_of(Path(folder))
            if calls not in (0, distill.teacher_steps):
                raise ValueError(
                    f"distill.teachers {folder} was taught {calls} calls and knows their noise levels alone: it "
                    f"teaches fewer calls, with --distill.teacher-steps {calls} and nothing else"
                )
            pipe.register_modules(vae=None)  # all is latent here
            if distill.guide_scale is not None:
                if pipe.guide is None and not pipe.config.experts_off:
                    raise ValueError(f"distill.guide_scale is {distill.guide_scale}, and {folder} has no guide")
                pipe.register_to_config(guide_scale=distill.guide_scale)
            if distill.cfg is not None and net.num_classes:
                pipe.register_to_config(guidance_scale=distill.cfg)
                if distill.cfg != 1 and not drops_labels(Path(folder)):
                    print(f"note: distill.cfg is {distill.cfg}, but {folder} was trained with no label left out")
            pipe.set_progress_bar_config(disable=True)
            pipe.to(device)
            if not few:
                try:
                    self.answers.append(Answers(pipe, words(config.objective, pipe), guided=distill.guided))
                except ValueError as error:
                    raise ValueError(f"distill.teachers {folder} cannot teach this objective: {error}") from error
            elif pipe.config.sampler not in ONE_CALL:
                name = pipe.config.sampler or "a scheduler of diffusers"
                raise ValueError(
                    f"distill.teachers {folder} draws by {name}, which few calls cannot follow; distill.teacher_steps "
                    f"needs one of {', '.join(ONE_CALL)}"
                )
        self.first = _first_labels(config, data, student.config.num_classes, self.pipes)

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
            return torch.stack([of(number, slice(None)) for number in range(len(self.pipes))]).mean(dim=0)
        known = [(domain == number, of(number, domain == number)) for number in domain.unique().tolist()]
        said = torch.empty(len(domain), *known[0][1].shape[1:], device=domain.device)
        for rows, own in known:
            said[rows] = own
        return said

    def _own(self, number: int, labels: Tensor | None) -> Tensor | None:
        """A teacher's labels, of the student's."""
        null = self.pipes[number].transformer.null_label
        if labels is None or null is None:
            return None
        assert self.null_label is not None
        return torch.where(labels == self.null_label, null, labels - self.first[number])


def _first_labels(config: Config, data: ImageSet, classes: int, pipes: Sequence[Any]) -> list[int]:
    """Of each teacher the student's label of its label 0, once both are found to have the same classes.

    Of a mixture the student has a set's classes after those of the sets before it, one of a set without any.
    """
    teachers, first = config.distill.teachers, list[int]()
    counts = [pipe.transformer.config.num_classes for pipe in pipes]
    sets = [one.id2label for one in data.sets] if isinstance(data, Mixture) else []
    for number, (folder, pipe, count) in enumerate(zip(teachers, pipes, counts, strict=True)):
        begin, known = 0, data.id2label
        if count != classes:
            own = config.distill.by == "domain" and count == len(sets[number])
            if not own:
                asked = f"its set {len(sets[number])}, all sets {classes}" if sets else f"the student {classes}"
                raise ValueError(f"distill.teachers {folder} has {count} classes, {asked}")
            begin, known = sum(max(1, len(names)) for names in sets[:number]), sets[number]
        first.append(begin)
        names = pipe.id2label
        other = next((label for label in sorted(names.keys() & known.keys()) if names[label] != known[label]), None)
        if other is not None:
            print(f"note: class {other} is {names[other]!r} to the teacher {folder}, and {known[other]!r} in the data")
    return first


def facts(config: Config) -> dict[str, list[str] | None]:
    """What the teachers' weights and settings are, file by file: a run goes on with the same. Empty without teachers.

    None where one is not there (any more), which a finished run does not need.
    """
    found = list[str]()
    for folder in config.distill.teachers:
        place = next((p for p in (Path(folder) / "model", Path(folder)) if (p / "model_index.json").is_file()), None)
        if place is None:
            return {"teachers": None}
        files = [place / "model_index.json", *sorted(place.glob("*/*.json")), *sorted(place.rglob("*.safetensors"))]
        found += map(digest, files)
    return {"teachers": found} if found else {}

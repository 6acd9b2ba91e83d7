"""The section `distill` of a configuration: who teaches beside the images. No torch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .checks import at_least, require

if TYPE_CHECKING:
    from .sections import Config


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: frozen networks say what this one should."""

    teachers: tuple[str, ...] = ()
    """Model folders or runs of the same images and classes; none: the images alone teach."""
    by: Literal["mean", "domain"] = "mean"
    """Of several teachers: the mean of what they say, or teacher 0 for the images of data.mixture's first set, 1 for
    those of the second and so on; such a teacher may know the classes of its set alone."""
    weight: float = 1.0
    """Share of the teachers' answers in the loss, above 0; the rest is that of the images."""
    guided: bool = False
    """The teachers answer as their folders guide them (scale, interval, guide), so that one pass does what took two."""
    cfg: float | None = None
    """Scale of their guidance by the classes, for guided and teacher_steps; None: each folder's own."""
    teacher_steps: int = 0
    """Few calls: so many steps of the teacher's own sampler, guided as its folder says (or by cfg), from noise to
    image; the student learns to draw the same in --sample.steps of flow-euler, and each image of a batch gives it all
    of these. 0: it learns what teachers say at every noise level, for all samplers."""

    def __post_init__(self) -> None:
        at_least(self, 0, "teacher_steps")
        require(0 < self.weight <= 1, f"weight is {self.weight}; it must lie in (0, 1]")
        if not self.teachers:
            changed = next((n for n in ("by", "weight", "guided", "cfg", "teacher_steps") if self._chosen(n)), None)
            require(changed is None, f"{changed} needs teachers; give them as --distill.teachers MODEL")
        require(self.cfg is None or 0 <= self.cfg < math.inf, f"cfg is {self.cfg}; it must be 0 or more, and finite")
        bare = self.cfg is not None and not (self.guided or self.teacher_steps)
        require(not bare, f"cfg is {self.cfg}, and the teachers are not guided; add --distill.guided, or leave it out")
        one = self.by == "domain" and len(self.teachers) == 1
        require(not one, "by domain needs a teacher for each data set; with one leave it out")
        if self.teacher_steps:
            require(len(self.teachers) < 2 or self.by == "domain", "teacher_steps follows one teacher, not several")
            require(
                self.weight == 1, f"weight is {self.weight}, but teacher_steps takes nothing from the images; use 1"
            )
            require(not self.guided, "guided is what teacher_steps means; leave it out")

    def _chosen(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(type(self), name))

    def check(self, config: "Config") -> None:
        """ValueError where the rest of a configuration does not go with it."""
        if not self.teachers:
            return
        sample, sets = config.sample, len(config.data.mixture)
        if self.by == "domain" and len(self.teachers) != sets:
            raise ValueError(
                f"distill.by domain has {len(self.teachers)} teachers, and data.mixture {sets} sets; give one for each"
            )
        if config.objective.learn_sigma:
            raise ValueError("objective.learn_sigma has no teacher for its variance; leave it or distill.teachers out")
        if (self.guided or self.teacher_steps) and sample.cfg != 1:
            name = "guided" if self.guided else "teacher_steps"
            raise ValueError(
                f"distill.{name} puts guidance into the network, and sample.cfg {sample.cfg} would add more; "
                f"set --sample.cfg 1"
            )
        if not self.teacher_steps:
            return
        if config.objective.prediction_type != "flow_prediction":
            raise ValueError(
                f"distill.teacher_steps makes steps of flow-euler, for --objective.prediction-type flow_prediction, "
                f"not {config.objective.prediction_type}"
            )
        if sample.sampler != "flow-euler":
            raise ValueError(
                f"distill.teacher_steps teaches the steps of flow-euler, and sample.sampler is {sample.sampler}; "
                f"add --sample.sampler flow-euler and --sample.steps N"
            )
        if not sample.steps <= self.teacher_steps <= 1000:
            raise ValueError(
                f"distill.teacher_steps is {self.teacher_steps}; it must be sample.steps, {sample.steps}, or more, and "
                f"at most 1000"
            )
        if config.other_sizes():
            raise ValueError(
                "distill.teacher_steps draws images of model.sample_size, and data.mixture has other sizes"
            )
        if config.objective.class_dropout_prob:
            raise ValueError(
                "distill.teacher_steps draws of classes alone, without guidance later on; add "
                "--objective.class-dropout-prob 0"
            )

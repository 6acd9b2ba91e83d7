"""The section `distill` of a configuration: who teaches beside the images. No torch."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from .checks import at_least, positive, require

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
    """Scale of their guidance by the classes, for guided and teacher_steps, instead of each folder's own."""
    guide_scale: float | None = None
    """Scale of their guidance by their guides, likewise."""
    teacher_steps: int = 0
    """Few calls: so many steps of the teacher's own sampler, guided as its folder says, from noise to image; the
    student learns to draw the same in --sample.steps of flow-euler, and each image of a batch gives it all
    of these. 0: it learns what teachers say at every noise level, for all samplers."""
    fake_steps: int = 0
    """Few calls by distribution matching, for a student that draws in few calls already: its images become as likely
    as the teacher's (guided: as the guided one's). So many steps of a second network, the fake, which begins as the
    teacher and learns what the student draws, for each of the student's; 3, say."""
    fake_learning_rate: float = 3e-4
    """Of the fake, by AdamW, constant."""

    def __post_init__(self) -> None:
        at_least(self, 0, "teacher_steps", "fake_steps", "cfg", "guide_scale")
        positive(self, "fake_learning_rate")
        require(0 < self.weight <= 1, f"weight is {self.weight}; it must lie in (0, 1]")
        if not self.teachers:
            changed = next((f.name for f in fields(self) if f.name != "teachers" and self._chosen(f.name)), None)
            require(changed is None, f"{changed} needs teachers; give them as --distill.teachers MODEL")
        for name in ("cfg", "guide_scale"):
            bare = self._chosen(name) and not (self.guided or self.teacher_steps)
            said = f"{name} is {getattr(self, name)}, and the teachers are not guided"
            require(not bare, f"{said}; add --distill.guided, or leave it out")
        one = self.by == "domain" and len(self.teachers) == 1
        require(not one, "by domain needs a teacher for each data set; with one leave it out")
        few = self.few
        if few is not None:
            require(len(self.teachers) < 2 or self.by == "domain", f"{few} follows one teacher, not several")
            require(self.weight == 1, f"weight is {self.weight}, but {few} takes nothing from the images; use 1")
        require(not (self.guided and self.teacher_steps), "guided is what teacher_steps means; leave it out")
        if self.fake_steps:
            require(not self.teacher_steps, "fake_steps follows teacher_steps in a run of its own; give one of them")
            require(self.by == "mean", "fake_steps follows one teacher, not several")
        else:
            bare = self._chosen("fake_learning_rate")
            require(not bare, "fake_learning_rate needs a fake; add --distill.fake-steps N, or leave it out")

    @property
    def few(self) -> Literal["teacher_steps", "fake_steps"] | None:
        """The option by which it learns to draw in few calls; None of a student that knows all noise levels."""
        return "teacher_steps" if self.teacher_steps else "fake_steps" if self.fake_steps else None

    def _chosen(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(type(self), name))

    def check(self, config: "Config") -> None:
        """ValueError where the rest of a configuration does not go with it."""
        if not self.teachers:
            return
        sample, sets, few = config.sample, len(config.data.mixture), self.few
        if self.by == "domain" and len(self.teachers) != sets:
            raise ValueError(
                f"distill.by domain has {len(self.teachers)} teachers, and data.mixture {sets} sets; give one for each"
            )
        if config.objective.learn_sigma:
            raise ValueError("objective.learn_sigma has no teacher for its variance; leave it or distill.teachers out")
        if self.fake_steps and sample.cfg != 1:
            raise ValueError(
                f"distill.fake_steps makes a student that draws without guidance, and sample.cfg is {sample.cfg}; "
                f"set --sample.cfg 1"
            )
        if (self.guided or few) and sample.cfg != 1:
            raise ValueError(
                f"distill.{few or 'guided'} puts guidance into the network, and sample.cfg {sample.cfg} would add "
                f"more; set --sample.cfg 1"
            )
        if few is None:
            return
        if config.objective.prediction_type != "flow_prediction":
            raise ValueError(
                f"distill.{few} makes steps of flow-euler, for --objective.prediction-type flow_prediction, "
                f"not {config.objective.prediction_type}"
            )
        if sample.sampler != "flow-euler":
            raise ValueError(
                f"distill.{few} teaches the steps of flow-euler, and sample.sampler is {sample.sampler}; "
                f"add --sample.sampler flow-euler and --sample.steps N"
            )
        if self.teacher_steps and not sample.steps <= self.teacher_steps <= 1000:
            raise ValueError(
                f"distill.teacher_steps is {self.teacher_steps}; it must be sample.steps, {sample.steps}, or more, and "
                f"at most 1000"
            )
        if config.other_sizes():
            raise ValueError(f"distill.{few} draws images of model.sample_size, and data.mixture has other sizes")
        if config.objective.class_dropout_prob:
            raise ValueError(
                f"distill.{few} draws of classes alone, without guidance later on; add --objective.class-dropout-prob 0"
            )
        if config.moe.jitter:
            raise ValueError(
                f"moe.jitter {config.moe.jitter} is the same for all images of a noise level, of which distill.{few} "
                f"has few; leave it out"
            )
        if self.fake_steps:
            self._check_fake(config)

    def _check_fake(self, config: "Config") -> None:
        train, parallel = config.train, config.parallel
        for name, value, usual in (
            ("train.accumulation", train.accumulation, 1), ("parallel.shard", parallel.shard, False),
            ("parallel.experts", parallel.experts, 1), ("objective.expert_weight", config.objective.expert_weight, 0),
        ):  # fmt: skip
            if value != usual:
                raise ValueError(f"{name} is {value}, which distill.fake_steps does not go with; leave it out")
        if config.train.init is None:
            raise ValueError("distill.fake_steps goes on from a student of few calls; give it as --train.init MODEL")
        if config.data.mixture:
            raise ValueError("distill.fake_steps follows one teacher, and data.mixture has several sets; leave it out")

"""What changes from step to step by itself: the learning rate, and the capacity of experts where it has a way to go."""

from ..config.sections import Config, TrainConfig
from ..model import DiTMoETransformer2DModel
from ..moe import MoELayer


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or linear down to zero at `decay_steps`."""
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.decay_steps is None:
        return train.learning_rate * warm
    left = (train.decay_steps - step) / (train.decay_steps - train.warmup_steps)
    return train.learning_rate * min(warm, max(0.0, left))


def anneal(model: DiTMoETransformer2DModel, config: Config, step: int) -> None:
    """Set the capacity of all layers for a step, where it starts elsewhere than it ends: linear, to `decay_steps`."""
    moe, decay = config.moe, config.train.decay_steps
    if moe.capacity_start is None:
        return
    assert decay is not None, "train refuses it"
    done = min(1.0, step / (decay - 1)) if decay > 1 else 1.0
    for module in model.modules():
        if isinstance(module, MoELayer | DiTMoETransformer2DModel):
            module.capacity = moe.capacity_start + (moe.rule.usual_capacity - moe.capacity_start) * done

"""Autoguidance: who guides a network, a weaker one or the same without its routed experts, and by how much.

With the scale w the sampler follows guide + w (network - guide) (Karras et al. 2024, arXiv 2406.02507), see
`samplers.guidance`.
"""

import math
from inspect import signature
from typing import Any, cast

from torch import Tensor, nn

from ..moe import MoELayer

EXPERTS_OFF = "experts-off"
NONE = "none"
GUIDE_SCALE = 2.0  # where neither the caller nor the model names one

_KINDS = f"it must be a network, such as another pipeline's transformer, {EXPERTS_OFF!r} or {NONE!r}"
_ALIKE = ("sample_size", "in_channels", "num_classes")


class ExpertsOff(nn.Module):
    """A network whose routed experts are left out: attention, dense layers and shared experts alone.

    A layer without a shared expert gives zero. It holds no weights of its own and runs no expert.

    Raises:
        ValueError: The network has no experts.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if not any(isinstance(module, MoELayer) for module in net.modules()):
            raise ValueError(
                f"guide is {EXPERTS_OFF}, but this model has no experts; give a smaller or an earlier model as guide"
            )
        self.net, self.config = net, cast("Any", net.config)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        """As of the network, without routing records."""
        return self.net(x, t, class_labels, routed=False)


def choose(
    net: nn.Module, guide: nn.Module | str | None, scale: float | None,
    saved: nn.Module | str | None = None, saved_scale: float | None = None,
) -> tuple[nn.Module | None, float]:  # fmt: skip
    """The guide of a call and its scale; (None, 1) where nothing guides.

    Args:
        net: The network that is guided.
        guide: Who was asked for: a network, "experts-off", "none"; None takes the saved one, if there is one.
        scale: w, 0 or more; None takes that of the saved guide, or `GUIDE_SCALE`. 1 switches a saved guide off.
        saved: The guide that the model names, a network or "experts-off".
        saved_scale: Its scale.

    Raises:
        ValueError: The guide is for other images or classes, or the scale cannot apply.
    """
    if guide == NONE or (guide is None and saved is None):
        if scale is not None:
            raise ValueError(f"guide_scale is {scale}, but there is no guide; give one, a model or {EXPERTS_OFF}")
        return None, 1.0
    if guide is None:
        guide, scale = saved, saved_scale if scale is None else scale
        if scale == 1:
            return None, 1.0
    w = GUIDE_SCALE if scale is None else float(scale)
    if not math.isfinite(w) or w < 0 or w == 1:
        raise ValueError(f"guide_scale is {w}; with a guide it must be 0 or more, and not 1, which is off")
    if isinstance(guide, str):
        if guide != EXPERTS_OFF:
            raise ValueError(f"guide is {guide!r}; {_KINDS}")
        return ExpertsOff(net), w
    if not isinstance(guide, nn.Module) or not _takes_labels(guide):
        raise ValueError(f"guide is {guide if isinstance(guide, int | float) else type(guide).__name__}; {_KINDS}")
    _check(net, guide)
    return guide, w


def _takes_labels(guide: nn.Module) -> bool:
    """Whether it is called as a network is; what wraps one takes anything."""
    known = signature(guide.forward).parameters.values()
    return any(p.name == "class_labels" or p.kind is p.VAR_KEYWORD for p in known)


def _check(net: Any, guide: Any) -> None:
    """ValueError unless the guide takes the images and labels that the network takes."""
    config = getattr(guide, "config", {})
    for name in _ALIKE:
        its, ours = config.get(name, net.config[name]), net.config[name]
        if its != ours:
            raise ValueError(
                f"the guide has {name} {its}, but the model has {ours}; give a guide of the same image size, channels "
                f"and classes"
            )

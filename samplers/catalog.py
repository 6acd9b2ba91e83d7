"""The samplers by name, and which networks each one fits."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from samplers import gaussian
from samplers.flow import FlowEulerScheduler
from samplers.schedulers import DDIMScheduler, DDPMScheduler

FLOW = ("flow_prediction",)


class Sampler(NamedTuple):
    """A scheduler class and the prediction types whose networks it can sample."""

    scheduler: Any
    prediction_types: tuple[str, ...]


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(DDPMScheduler, gaussian.PREDICTION_TYPES),
    "ddim": Sampler(DDIMScheduler, gaussian.PREDICTION_TYPES),
    "flow-euler": Sampler(FlowEulerScheduler, FLOW),
}

# Options of diffusers' flow-matching schedulers that change the path and that ours do not have.
_FOREIGN_FLOW_OPTIONS = (
    "use_dynamic_shifting",
    "shift_terminal",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


def prediction_type_of(config: Mapping[str, Any]) -> str:
    """What the network of a saved scheduler ``config`` predicts, in diffusers' names.

    A config without the field is diffusers' flow matching ("flow_prediction") if it has a
    ``shift``, else "epsilon", the default of every stock scheduler.
    """
    if "prediction_type" in config:
        return str(config["prediction_type"])
    return "flow_prediction" if "shift" in config else "epsilon"


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler ``name`` of `SAMPLERS`, built from a saved scheduler's ``config``.

    Fields that only another scheduler knows are left out. Raises ValueError, one sentence, for an
    unknown name, for a sampler that does not fit the config's prediction type, and for a
    flow-matching option that ours do not have.
    """
    if name not in SAMPLERS:
        near = get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no sampler {name!r}; {hint}choose from {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    kind = prediction_type_of(config)
    fitting = [other for other, entry in SAMPLERS.items() if kind in entry.prediction_types]
    if not fitting:
        known = dict.fromkeys(k for entry in SAMPLERS.values() for k in entry.prediction_types)
        raise ValueError(f"prediction_type {kind!r} is not one of {', '.join(known)}")
    if name not in fitting:
        raise ValueError(
            f"sampler {name!r} cannot sample a model with prediction_type {kind!r}; use {' or '.join(fitting)}"
        )
    foreign = [option for option in _FOREIGN_FLOW_OPTIONS if config.get(option)]
    if sampler.prediction_types == FLOW and foreign:
        raise ValueError(
            f"sampler {name!r} has no {foreign[0]}; remove it from the scheduler's config or use "
            "the diffusers scheduler that wrote it"
        )
    # Take every field at its word: from_config would swap those that another scheduler left at its
    # default for defaults of the new one, so a config would change meaning when saved to disk.
    fields = {key: value for key, value in config.items() if key != "_use_default_values"}
    return sampler.scheduler.from_config(fields)

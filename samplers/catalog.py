"""The samplers by name, and what each one reads."""

from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from inspect import signature
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from samplers import gaussian
from samplers.flow import FlowEulerScheduler, FlowHeunScheduler, FlowSDEScheduler
from samplers.grid import refuse_lost
from samplers.pndm import PNDMScheduler
from samplers.schedulers import DDIMScheduler, DDPMScheduler
from samplers.solvers import DPMSolverScheduler, UniPCScheduler
from samplers.time_shift import TimeShiftScheduler

FLOW = ("flow_prediction",)


class Sampler(NamedTuple):
    """A scheduler class, the prediction types that it reads, and the options that its name means.

    Networks of other types are translated (`samplers.translate`), so that every sampler draws from every network.
    """

    scheduler: Any
    prediction_types: tuple[str, ...]
    options: Mapping[str, Any] = MappingProxyType({})


def _time_shift(base: str) -> Sampler:
    return Sampler(TimeShiftScheduler, gaussian.PREDICTION_TYPES, MappingProxyType({"base": base}))


# What `ts-*` does unless it or the saved config is told otherwise (docs/samplers.md, "Measurements").
TIME_SHIFT: Mapping[str, Any] = MappingProxyType({"exposure_mode": "both", "exposure_window": None})
TIME_SHIFT_CUTOFF = 0.1  # of the training steps

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(DDPMScheduler, gaussian.PREDICTION_TYPES),
    "ddim": Sampler(DDIMScheduler, gaussian.PREDICTION_TYPES),
    "pndm": Sampler(PNDMScheduler, gaussian.PREDICTION_TYPES),
    "ts-ddpm": _time_shift("ddpm"),
    "ts-ddim": _time_shift("ddim"),
    "ts-pndm": _time_shift("pndm"),
    "dpm++2m": Sampler(DPMSolverScheduler, gaussian.PREDICTION_TYPES),
    "unipc": Sampler(UniPCScheduler, gaussian.PREDICTION_TYPES),
    "flow-euler": Sampler(FlowEulerScheduler, FLOW),
    "flow-heun": Sampler(FlowHeunScheduler, FLOW),
    "flow-sde": Sampler(FlowSDEScheduler, FLOW),
}

# Fields that change what a chain is; a sampler without them cannot stand in for one that was saved with them.
_MEANINGFUL = ("rescale_betas_zero_snr", "clip_sample", "thresholding")

# What a saved sampler has to say about the chain, and the next one hands on whether or not it knows the field; but
# the solvers keep fields of their own alone, so that `variance_type` and what belongs to clipping are lost with them.
_OF_THE_CHAIN = frozenset(signature(DDPMScheduler.__init__).parameters)

# What is no loss of a sampler that has no such field: the network's prediction type says it.
_HANDED_ON = {*_OF_THE_CHAIN, "use_flow_sigmas"}

# Options of diffusers' flow-matching schedulers that change the path and that ours do not have.
_FOREIGN_FLOW_OPTIONS = (
    "use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip


def prediction_type_of(config: Mapping[str, Any]) -> str:
    """What the network of a saved scheduler ``config`` predicts, in diffusers' names.

    A config without the field is diffusers' flow matching ("flow_prediction") if it has a
    ``shift``, else "epsilon", the default of every stock scheduler.
    """
    if "prediction_type" in config:
        return str(config["prediction_type"])
    return "flow_prediction" if "shift" in config else "epsilon"


def make_scheduler(name: str, config: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
    """The scheduler ``name`` of `SAMPLERS`, built from a saved scheduler's ``config``.

    Fields that only another scheduler knows are left out. Where it does not read the config's prediction type, it reads
    v, or the flow's velocity, into which `samplers.sample` translates the network's answers. ``options`` are fields of
    this one that are to differ from the config and from what the name means. Raises ValueError, one sentence, for an
    unknown name or prediction type, and for options and fields that this sampler does not have.
    """
    if name not in SAMPLERS:
        near = sorted(get_close_matches(name, SAMPLERS), key=lambda known: sorted(known) != sorted(name))
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no sampler {name!r}; {hint}choose from {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    kind = prediction_type_of(config)
    if kind not in (*gaussian.PREDICTION_TYPES, *FLOW):
        raise ValueError(f"prediction_type {kind!r} is not one of {', '.join((*gaussian.PREDICTION_TYPES, *FLOW))}")
    known = signature(sampler.scheduler.__init__).parameters
    for option in options or {}:
        if option not in known or option == "self":
            having = [other for other, entry in SAMPLERS.items() if option in signature(entry.scheduler).parameters]
            hint = f"; it belongs to {', '.join(having)}" if having else ""
            raise ValueError(f"sampler {name!r} has no {option}{hint}")
    for_flow = sampler.prediction_types == FLOW
    foreign = (_FOREIGN_FLOW_OPTIONS if for_flow else ()) + (() if for_flow and kind in FLOW else _MEANINGFUL)
    refuse_lost(f"sampler {name!r}", [field for field in foreign if field not in known], config)
    # Take every field at its word: from_config would swap those that another scheduler left at its
    # default for defaults of the new one, so a config would change meaning when saved to disk.
    fields = {key: value for key, value in config.items() if key in known or key in _OF_THE_CHAIN}
    if kind not in sampler.prediction_types:
        fields["prediction_type"] = FLOW[0] if for_flow else "v_prediction"
    if for_flow and kind not in FLOW:
        fields.setdefault("beta_schedule", "linear")  # the default of every chain, said for `translation`
    if for_flow and "flow_shift" in config:  # what diffusers' solvers call it
        fields.setdefault("shift", config["flow_shift"])
    if fields.get("variance_type", "") is None:  # the stock solvers say so, and mean that they do not know
        del fields["variance_type"]
    if sampler.scheduler is TimeShiftScheduler:
        cutoff = int(TIME_SHIFT_CUTOFF * config.get("num_train_timesteps", 1000))
        fields = {**TIME_SHIFT, "exposure_cutoff": cutoff, **fields}
    return sampler.scheduler.from_config({**fields, **sampler.options, **(options or {})})


def name_of(scheduler: Any) -> str | None:
    """What `SAMPLERS` calls a scheduler; None for one of diffusers' own, or of another library."""
    for name, sampler in SAMPLERS.items():
        means = sampler.options.items()
        if type(scheduler) is sampler.scheduler and all(scheduler.config.get(key) == value for key, value in means):
            return name
    return None


def adopted(scheduler: Any, prediction_type: str, steps: int, options: Mapping[str, Any] | None = None) -> Any:
    """A copy of a scheduler of diffusers, its timesteps set, for a network of this prediction type.

    It reads that, or what `samplers.translate` makes of it: its own ``prediction_type`` says nothing about the network.
    Raises ValueError for a scheduler that is neither over a chain of betas nor a flow's, and for ``options``, which it
    was to be made with.
    """
    kind = type(scheduler)
    if options:
        what = f"{kind.__name__}.from_config(pipe.scheduler.config, {next(iter(options))}=...)"
        raise ValueError(f"options {sorted(options)} go with a sampler of ours; set pipe.scheduler = {what}")
    known, config = signature(kind.__init__).parameters, getattr(scheduler, "config", {})
    flows = bool(config.get("use_flow_sigmas")) or ("shift" in known and "prediction_type" not in known)
    steps_by = signature(getattr(kind, "step", lambda: 0)).parameters.values()
    needed = [p.name for p in steps_by if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    noises = hasattr(kind, "add_noise") or hasattr(kind, "scale_noise")
    if len(needed) > 4 or not noises or (not flows and not {"prediction_type", "beta_start"} <= known.keys()):
        raise ValueError(f"scheduler {kind.__name__} is not for such networks; use one such as DDIM, Euler, DPM-Solver")
    reads = FLOW[0] if flows else prediction_type if prediction_type in ("epsilon", "v_prediction") else "v_prediction"
    try:
        copied = deepcopy(scheduler)
        copied.register_to_config(prediction_type=reads)
        if "variance_type" not in vars(copied) and copied.config.get("variance_type") is not None:
            copied.register_to_config(variance_type=None)  # the solvers would cut images to three channels
        copied.set_timesteps(steps)
    except LIBRARY_ERRORS as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"scheduler {kind.__name__} cannot take {steps!r} steps: {sentence:.300}") from error
    if len(copied.timesteps) > 1 and copied.timesteps[0] < copied.timesteps[-1]:
        raise ValueError(
            f"scheduler {kind.__name__} goes from images to noise; use one such as DDIM, Euler, DPM-Solver"
        )
    return copied


def check_nothing_lost(scheduler: Any, name: str) -> None:
    """ValueError where a scheduler of diffusers was told what sampler ``name``, which is to draw instead, has not."""
    if name not in SAMPLERS:  # which `make_scheduler` says
        return
    known, kind = {*signature(SAMPLERS[name].scheduler.__init__).parameters}, type(scheduler)
    known |= {"flow_shift"} if "shift" in known else set()
    inits = [vars(cls)["__init__"] for cls in reversed(kind.__mro__) if "__init__" in vars(cls)]
    parameters = {name: p.default for init in inits for name, p in signature(init).parameters.items()}
    for field, default in parameters.items():
        value = scheduler.config.get(field, default)
        if field not in known and field not in _HANDED_ON and _plain(value) != _plain(default):
            having = [other for other in SAMPLERS if field in signature(SAMPLERS[other].scheduler.__init__).parameters]
            named = f", name one that has it ({', '.join(having)})" * bool(having)
            what = f"sampler {name!r} has no {field}, which the scheduler that it would replace has as {value!r}"
            raise ValueError(f"{what}; leave the sampler out{named}, or set another {kind.__name__}")


def _plain(value: Any) -> Any:
    """A field's value, whatever sequence it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [*value] if isinstance(value, tuple) else value


def shift_field(name: str) -> str | None:
    """What the sampler's scheduler calls the warping of its grid towards noise; None where it has no such thing."""
    known = signature(SAMPLERS[name].scheduler.__init__).parameters if name in SAMPLERS else {}
    return next((field for field in ("shift", "grid_shift") if field in known), None)


# What alpha_bar follows from.
CHAIN = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")

LIBRARY_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # of diffusers


def scheduler_for(name: str, config: Mapping[str, Any], steps: int, options: Mapping[str, Any] | None = None) -> Any:
    """`make_scheduler` with its timesteps set, one a network call.

    Raises ValueError for what only the libraries beneath notice too, such as a saved beta that is no number.
    """
    try:
        scheduler = make_scheduler(name, config, options)
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error  # a library's becomes ours
    except LIBRARY_ERRORS as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"sampler {name!r} cannot be made of the saved scheduler's config: {sentence:.300}") from error
    return scheduler


def network_calls(name: str, config: Mapping[str, Any], steps: int, options: Mapping[str, Any] | None = None) -> int:
    """NFE: the network calls of sampler ``name`` for an image in ``steps`` steps; guidance makes each two passes."""
    return len(scheduler_for(name, config, steps, options).timesteps)


def chain_of(config: Mapping[str, Any]) -> Tensor:
    """alpha_bar (T,) float64 of the chain that a scheduler's ``config`` is of, or that it was made from."""
    chain: Tensor = DDPMScheduler(**{field: config[field] for field in CHAIN if field in config})._alpha_bar
    return chain

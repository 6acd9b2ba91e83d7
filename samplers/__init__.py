"""Samplers: diffusers schedulers and the one loop that runs them; only torch and diffusers."""

from samplers.catalog import SAMPLERS, Sampler, make_scheduler, network_calls, prediction_type_of
from samplers.flow import FlowEulerScheduler, FlowHeunScheduler, FlowSDEScheduler
from samplers.guidance import Guidance
from samplers.loop import sample
from samplers.noise import draw_noise, image_generators, initial_noise
from samplers.pndm import PNDMScheduler
from samplers.schedulers import DDIMScheduler, DDPMScheduler
from samplers.solvers import DPMSolverScheduler, UniPCScheduler
from samplers.time_shift import TimeShiftScheduler
from samplers.translate import Translated

__all__ = [
    "SAMPLERS", "DDIMScheduler", "DDPMScheduler", "DPMSolverScheduler", "FlowEulerScheduler", "FlowHeunScheduler",
    "FlowSDEScheduler", "Guidance", "PNDMScheduler", "Sampler", "TimeShiftScheduler", "Translated", "UniPCScheduler",
    "draw_noise", "image_generators", "initial_noise", "make_scheduler", "network_calls", "prediction_type_of",
    "sample",
]  # fmt: skip

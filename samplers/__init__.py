"""Samplers: diffusers schedulers and the one loop that runs them; only torch and diffusers."""

from samplers.catalog import SAMPLERS, Sampler, make_scheduler, prediction_type_of
from samplers.flow import FlowEulerScheduler
from samplers.loop import sample
from samplers.noise import draw_noise, image_generators, initial_noise
from samplers.schedulers import DDIMScheduler, DDPMScheduler

__all__ = [
    "SAMPLERS",
    "DDIMScheduler",
    "DDPMScheduler",
    "FlowEulerScheduler",
    "Sampler",
    "draw_noise",
    "image_generators",
    "initial_noise",
    "make_scheduler",
    "prediction_type_of",
    "sample",
]

"""A pipeline of diffusers, which people exchange, and its folder. Saved files know it as `ditmoe.pipeline`."""

from .folder import add_guide, add_vae, assemble, load, save, shift_option, trained_steps
from .pipeline import DiTMoEPipeline

__all__ = ["DiTMoEPipeline", "add_guide", "add_vae", "assemble", "load", "save", "shift_option", "trained_steps"]

"""Diffusion transformers with mixture-of-experts layers: model, objectives, training, pipeline, report."""

__version__ = "0.1.0"

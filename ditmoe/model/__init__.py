"""The network, its blocks, and how a configuration makes one. Saved files know it as `ditmoe.model`."""

from diffusers.models.modeling_utils import ModelMixin  # diffusers looks for it here to load a network

from .assembly import KEYS, build, check_network, count_parameters, initial, moe_layer_names, tokens_per_image
from .blocks import DiTBlock, DiTMoEOutput, FinalLayer, Heads, to_compile
from .network import DiTMoETransformer2DModel

__all__ = [
    "KEYS", "DiTBlock", "DiTMoEOutput", "DiTMoETransformer2DModel", "FinalLayer", "Heads", "ModelMixin", "build",
    "check_network", "count_parameters", "initial", "moe_layer_names", "to_compile", "tokens_per_image",
]  # fmt: skip

"""The network, its blocks, and how a configuration makes one. Saved files know it as `ditmoe.model`."""

from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # looked for here, where diffusers loads a network

from .assembly import KEYS as KEYS
from .assembly import build as build
from .assembly import check_network as check_network
from .assembly import count_parameters as count_parameters
from .assembly import initial as initial
from .assembly import moe_layer_names as moe_layer_names
from .assembly import tokens_per_image as tokens_per_image
from .blocks import DiTBlock as DiTBlock
from .blocks import DiTMoEOutput as DiTMoEOutput
from .blocks import FinalLayer as FinalLayer
from .blocks import Heads as Heads
from .network import DiTMoETransformer2DModel as DiTMoETransformer2DModel

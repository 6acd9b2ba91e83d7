"""Whether what was written is a network that answers: one forward pass with one block in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import read_object
from ..layers import sincos_positions
from ..model import DiTMoETransformer2DModel
from ..pipe.handed_in import blank
from .tensors import Tensors


@torch.no_grad()
def check_forward(folder: Path) -> str:
    """A sentence on the answer to one image of noise, of the network whose config.json and weights a folder holds.

    It computes in float32, or for weights of 16 bits in bfloat16. Raises ValueError where the answer is not finite.
    """
    tensors, config = Tensors(sorted(folder.glob("*.safetensors"))), read_object(folder / "config.json")
    made = blank(lambda: DiTMoETransformer2DModel.from_config(config), limit=2 * len(tensors.shapes))
    assert isinstance(made, DiTMoETransformer2DModel)
    net: Any = made.eval()
    net.pos_embed = sincos_positions(config["hidden_size"], config["sample_size"] // config["patch_size"])
    dtype = torch.float32 if min(kind.itemsize for kind in tensors.dtypes.values()) >= 4 else torch.bfloat16
    names = ["x_embedder", "t_embedder", "y_embedder", "final_layer", *(f"blocks.{i}" for i in range(config["depth"]))]
    for name in names:

        def fill(module: nn.Module, _inputs: Any, prefix: str = f"{name}.") -> None:
            own = {key: tensors[prefix + key].to(dtype) for key in module.state_dict()}
            module.load_state_dict(own, assign=True)

        def empty(module: nn.Module, _inputs: Any, _output: Any) -> None:
            module.to("meta")

        part = net.get_submodule(name)
        part.register_forward_pre_hook(fill)
        part.register_forward_hook(empty)
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = net(x, torch.tensor([500.0]), torch.tensor([0])).sample.float()
    if not y.isfinite().all():
        raise ValueError("the network's answer is not finite: the checkpoint is damaged, or not what it was taken for")
    size = y.square().mean().sqrt()
    return f"a forward pass at t 500 in {str(dtype).removeprefix('torch.')}: finite, root mean square {size:.4g}"

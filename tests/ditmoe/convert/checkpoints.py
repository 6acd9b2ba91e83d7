"""Small random checkpoints in the layouts of others."""

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.reference.foreign import positions

D, DEPTH, HEADS, CLASSES, EXPERTS, SIDE, PATCH = 32, 2, 2, 5, 4, 4, 2
KINDS = ("dit", "sit", "dit-moe", "flash")
FLAGS = {  # what has to be said of them
    "dit": ("--from", "dit", "--num-heads", "2"),
    "sit": ("--from", "sit", "--num-heads", "2"),
    "dit-moe": ("--num-heads", "2", "--prediction-type", "epsilon"),
    "flash": ("--prediction-type", "flow_prediction"),
}


def checkpoint(kind: str, channels: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a network of 2 blocks for latents of 8 x 8."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {"pos_embed": positions(D, SIDE).float()}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.1
        if bias:
            found[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    add("x_embedder.proj", D, channels, PATCH, PATCH)
    add("t_embedder.mlp.0", D, 256)
    add("t_embedder.mlp.2", D, D)
    add("y_embedder.embedding_table", CLASSES + 1, D, bias=False)
    for i in range(DEPTH):
        name = f"blocks.{i}"
        add(f"{name}.adaLN_modulation.1", 6 * D, D)
        add(f"{name}.attn.{'Wqkv' if kind == 'flash' else 'qkv'}", 3 * D, D)
        add(f"{name}.attn.{'out_proj' if kind == 'flash' else 'proj'}", D, D)
        if kind == "flash":
            add(f"{name}.attn.q_norm", D // HEADS)
            add(f"{name}.attn.k_norm", D // HEADS)
        if kind in ("dit", "sit"):
            add(f"{name}.mlp.fc1", 4 * D, D)
            add(f"{name}.mlp.fc2", D, 4 * D)
            continue
        add(f"{name}.moe.gate", EXPERTS, D, bias=False)
        for expert, width in [*((f"experts.{e}", 4 * D) for e in range(EXPERTS)), ("shared_experts", 2 * D)]:
            add(f"{name}.moe.{expert}.gate_proj", width, D, bias=False)
            add(f"{name}.moe.{expert}.up_proj", width, D, bias=False)
            add(f"{name}.moe.{expert}.down_proj", D, width, bias=False)
    add("final_layer.adaLN_modulation.1", 2 * D, D)
    add("final_layer.linear", PATCH * PATCH * 2 * channels, D)
    return found


def diffusers_dit(**changes: Any) -> Any:
    """Of the same sizes; its embeddings are the same in every block, as in what people publish."""
    options = {
        "num_attention_heads": HEADS, "attention_head_dim": D // HEADS, "in_channels": 4, "out_channels": 8,
        "num_layers": DEPTH, "sample_size": SIDE * PATCH, "patch_size": PATCH, "num_embeds_ada_norm": CLASSES,
    }  # fmt: skip
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(**{**options, **changes})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in net.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net.eval()

"""Whose names are whose: the tensors of other checkpoints beside ours, a table a layout.

Shapes: C channels, D width, E experts, F hidden width of an expert, T tokens of an image.
"""

import re
from collections.abc import Iterable

_EXPERTS = {
    "blocks.{i}.moe.router": ("blocks.{i}.moe.gate",),
    "blocks.{i}.moe.experts.w_in": ("blocks.{i}.moe.experts.{e}.gate_proj", "blocks.{i}.moe.experts.{e}.up_proj"),
    "blocks.{i}.moe.experts.w_out": ("blocks.{i}.moe.experts.{e}.down_proj",),
    "blocks.{i}.moe.shared.fc1": ("blocks.{i}.moe.shared_experts.gate_proj", "blocks.{i}.moe.shared_experts.up_proj"),
    "blocks.{i}.moe.shared.fc2": ("blocks.{i}.moe.shared_experts.down_proj",),
}
_EMBEDDING, _BLOCK = "transformer_blocks.{i}.norm1.emb", "transformer_blocks.{i}"

# Ours -> theirs, without .weight and .bias, block {i} and expert {e}, where they differ. Of several names ours holds
# one after the other along its first axis (over all experts); a name with a block beside ours without one is a copy in
# every block.
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "dit": {},  # and SiT
    "dit-moe": _EXPERTS,  # S, B and L
    "dit-moe-flash": {  # XL and G
        **_EXPERTS,
        "blocks.{i}.attn.qkv": ("blocks.{i}.attn.Wqkv",),
        "blocks.{i}.attn.proj": ("blocks.{i}.attn.out_proj",),
    },
    "diffusers": {
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": (f"{_EMBEDDING}.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (f"{_EMBEDDING}.timestep_embedder.linear_2",),
        "y_embedder.embedding_table": (f"{_EMBEDDING}.class_embedder.embedding_table",),
        "blocks.{i}.adaLN_modulation.1": (f"{_BLOCK}.norm1.linear",),
        "blocks.{i}.attn.qkv": (f"{_BLOCK}.attn1.to_q", f"{_BLOCK}.attn1.to_k", f"{_BLOCK}.attn1.to_v"),
        "blocks.{i}.attn.proj": (f"{_BLOCK}.attn1.to_out.0",),
        "blocks.{i}.mlp.fc1": (f"{_BLOCK}.ff.net.0.proj",),
        "blocks.{i}.mlp.fc2": (f"{_BLOCK}.ff.net.2",),
        "final_layer.adaLN_modulation.1": ("proj_out_1",),
        "final_layer.linear": ("proj_out_2",),
    },
}
POSITIONS = {"diffusers": "pos_embed.pos_embed"}  # theirs of the fixed table (1, T, D); elsewhere pos_embed

_MARKS = {  # what only a checkpoint of this layout has, the first that fits
    "blocks.0.attn.Wqkv.weight": "dit-moe-flash",
    "blocks.0.moe.gate.weight": "dit-moe",
    "blocks.0.mlp.fc1.weight": "dit",
    "transformer_blocks.0.attn1.to_q.weight": "diffusers",
}
_REFUSED = {  # a part of a name: whose it is, and what has no place here
    ".mlp.w12.": "LightningDiT's (or JiT's): its norms have weights, its SwiGLU biases, its positions another rotation",
    ".cluster_centers": "ProMoE's: images without a label have an expert of their own, and its experts have biases",
    ".expert_threshold": "DiffMoE's: its thresholds belong to a predictor of two layers",
    ".gate_weight": "EC-DiT's as DiffMoE's repository has it: how many tokens an expert takes is not in the file",
    ".e_score_correction_bias": "DSMoE's: its positions are another rotation (base 10000, ours 100)",
}


def recognise(names: Iterable[str]) -> str:
    """The layout of a checkpoint, by its names.

    Raises:
        ValueError: It is of none; of those that are known but do not fit it says which part does not.
    """
    names = set(names)
    for part, whose in _REFUSED.items():
        if any(part in name for name in names):
            raise ValueError(f"the checkpoint is {whose}; it cannot be converted")
    for mark, layout in _MARKS.items():
        if mark in names:
            return layout
    some = ", ".join(sorted(names)[:3]) or "nothing"
    raise ValueError(
        f"the checkpoint is neither DiT's, SiT's, DiT-MoE's nor diffusers' DiT (it has {some:.200}, ..., and none of "
        f"{', '.join(_MARKS)})"
    )


def theirs(ours: str, layout: str, depth: int, experts: int) -> list[list[str]]:
    """Their names of a tensor of ours: of each copy that they hold, its parts along the first axis in their order."""
    stem, _, kind = ours.rpartition(".")
    if kind not in ("weight", "bias"):  # stacked experts
        stem, kind = ours, "weight"
    block = re.match(r"blocks\.(\d+)\.", stem)
    general = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", stem)
    stems = LAYOUTS[layout].get(general, (general,))
    of_experts = range(experts if any("{e}" in s for s in stems) else 1)
    repeated = block is None and any("{i}" in s for s in stems)
    blocks = range(depth) if repeated else [int(block[1]) if block else 0]
    return [[f"{s.format(i=i, e=e)}.{kind}" for e in of_experts for s in stems] for i in blocks]

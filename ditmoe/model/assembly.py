"""Networks by their configuration: made, checked, counted."""

import dataclasses
import math
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from safetensors import SafetensorError, safe_open

from ..config.file import check_types
from ..config.sections import Config, ModelConfig, MoEConfig
from ..moe import AttentionExperts, Experts, MoELayer, Router
from .network import DiTMoETransformer2DModel

KEYS = {  # fields of the configuration that the network, and so a saved model, knows by another name
    "blocks": "moe_blocks",
    "router": "router_kind",
    "score": "router_score",
    "renormalize": "router_renormalize",
    "scale": "router_scale",
    "scope": "router_scope",
    "select": "router_select",
    "tau": "router_tau",
    "capacity": "router_capacity",
    "overflow": "router_overflow",
    "groups": "router_groups",
    "top_groups": "router_top_groups",
    "rank": "expert_rank",
    "weights": "router_weights",
    "biases": "expert_biases",
}


def build(config: Config, num_classes: int) -> DiTMoETransformer2DModel:
    """A new model with the weights of torch's current random state."""
    known = signature(DiTMoETransformer2DModel.__init__).parameters
    fields = {**vars(config.model), **vars(config.moe), **vars(config.objective)}
    options = {KEYS.get(name, name): value for name, value in fields.items()}
    options |= {"num_classes": num_classes, "router_bias": config.moe.bias_rate > 0}
    options |= {"router_scale": config.moe.routed_scale, "other_sizes": tuple(config.other_sizes())}
    if config.model.attention_width == config.model.hidden_size:
        options["head_width"] = None  # said or not, the networks are equal
    if config.moe.experts == "factorised":
        options["expert_rank"] = config.moe.factors(config.model.hidden_size, config.model.activation)
    model: DiTMoETransformer2DModel = DiTMoETransformer2DModel(**{k: v for k, v in options.items() if k in known})
    return model


def initial(config: Config, num_classes: int) -> DiTMoETransformer2DModel:
    """What training begins from: a new model, with the centres of its centroid routers, which `build` leaves at 0.

    ValueError where the file of the centres cannot be read, or is not for this model.
    """
    model = build(config, num_classes)
    if config.moe.router == "centroid" and config.moe.blocks != "none":
        _set_centroids(model, config.moe.centroids)
    return model


def _set_centroids(model: DiTMoETransformer2DModel, file: Path | None) -> None:
    """Give every router its centres: the file's `blocks.3` (E, I D) is of block 3, `router` of a shared router."""
    if file is None:
        raise ValueError("moe.router centroid needs --moe.centroids FILE, made by python -m ditmoe centroids")
    try:
        with safe_open(file, framework="pt") as opened:
            found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            seen = (opened.metadata() or {}).get("router_input", model.config.router_input)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"moe.centroids {file} cannot be read: {error}") from error
    if seen != model.config.router_input:
        what = f"was made for router_input {seen}, not {model.config.router_input}"
        raise ValueError(f"moe.centroids {file} {what}; add --moe.router-input {seen}, or make another file")
    for name, module in model.named_modules():
        if isinstance(module, Router) and module.kind == "centroid":
            key, shape = name.removesuffix(".moe.router"), tuple(module.weight.shape)
            if key not in found or tuple(found[key].shape) != shape:
                has = tuple(found[key].shape) if key in found else "nothing"
                raise ValueError(f"moe.centroids {file} has {has} for {key}, and this model needs {shape}")
            module.weight.copy_(found[key])


def count_parameters(model: DiTMoETransformer2DModel) -> tuple[int, int]:
    """(total, activated) parameters; activated = total without the experts that a token does not visit.

    The fixed sine-cosine table counts, as it does in DiT's published numbers.
    """
    total = sum(p.numel() for p in model.parameters())
    total += 0 if model.pos_embed is None else model.pos_embed.numel()
    idle = 0
    for module in model.modules():
        if isinstance(module, MoELayer) and isinstance(module.experts, Experts):
            E = module.experts.w_in.shape[0]
            one = (module.experts.w_in.numel() + module.experts.w_out.numel()) // E
            idle += round((E - module.rule.active(E)) * one)
        elif isinstance(module, AttentionExperts):
            E, K = module.num_experts, module.top_k
            idle += (module.w_v.numel() + module.w_o.numel()) * (E - K) // E
    return total, total - idle


def tokens_per_image(model: DiTMoETransformer2DModel) -> int:
    """T, the tokens of one image."""
    return math.prod((model.config.sample_size // model.config.patch_size,) * 2)


def moe_layer_names(net: DiTMoETransformer2DModel) -> list[str]:
    """Names of the blocks that hold experts, counted from 0."""
    return [f"block {i}" for i, b in enumerate(net.blocks) if any(isinstance(m, MoELayer) for m in b.modules())]


def check_network(values: Mapping[str, Any]) -> None:
    """ValueError unless these are settings of a network that can be built and used, whatever its weights are."""
    make = DiTMoETransformer2DModel.__init__
    DiTMoETransformer2DModel.extract_init_dict(values)
    check_types(values, get_type_hints(make))
    c = {**{name: p.default for name, p in signature(make).parameters.items()}, **values, "router_renormalize": False}
    c |= {"balance_weight": 0.0, "experts": "factorised" if c["expert_rank"] is not None else "stacked"}
    for section in (ModelConfig, MoEConfig):
        keys = {field.name: KEYS.get(field.name, field.name) for field in dataclasses.fields(section)}
        section(**{name: c[key] for name, key in keys.items() if key in c})

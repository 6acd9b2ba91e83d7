"""What changes of a model have in common: a network of other settings, its configuration, experts cut out of layers.

Shapes: D width, E experts, F hidden units of one, H hidden units of a dense layer; m matrices before the activation, 2
for swiglu and 1 for gelu.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from ..config.experts import has_experts
from ..config.sections import Config, MoEConfig
from ..model import KEYS, DiTMoETransformer2DModel, check_network
from ..moe import FeedForward, MoELayer, Router

SILENT = 8  # hidden units of a shared expert that is there for its output bias

TOPK: dict[str, Any] = {  # settings of a network whose tokens take their best experts, each layer for itself
    "router_kind": "linear", "cosine_scale": None, "router_scope": "layer", "router_score": "sigmoid",
    "router_select": "topk", "router_tau": None, "router_capacity": None, "router_overflow": "none",
    "router_weights": "scores", "router_groups": 1, "router_top_groups": 1, "null_experts": 0, "shared_gate": False,
    "expert_rank": None,
}  # fmt: skip


def rebuilt(
    net: DiTMoETransformer2DModel, weights: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> DiTMoETransformer2DModel:
    """A network with some settings changed, in eval mode: tensors of `weights`, and where it has none those of `net`.

    ValueError where the settings do not go together.
    """
    known = signature(DiTMoETransformer2DModel.__init__).parameters
    options = {name: value for name, value in net.config.items() if name in known} | dict(settings)
    check_network(options)
    with torch.random.fork_rng(devices=[]):  # of first weights, which nobody sees
        made: DiTMoETransformer2DModel = DiTMoETransformer2DModel(**options)
    found = {**net.state_dict(), **weights}
    assert weights.keys() <= made.state_dict().keys(), "a tensor has no place"
    made.load_state_dict({name: found[name].detach() for name in made.state_dict()})
    made.to(net.device).eval()
    return made


def described(net: DiTMoETransformer2DModel, config: Config) -> Config:
    """A configuration whose network is one like `net`; what `net` does not say is as in `config`.

    As OUT/training.json of a model folder OUT it is what trains the model on, balance at the rates of `config`:
    `python train.py OUT/training.json --train.init OUT --out RUN`. Where routers have biases and `config` does not move
    them, DeepSeek-V3's rate does. Where weights are one no loss moves the routers: they stay as they were fitted. Dense
    layers are no longer trained to be sparse once there are experts. Of another number of experts those of a data set
    have other numbers, so that no loss gives it the ones it had (`domain_weight`).
    """
    c = net.config
    moe: dict[str, Any] = {"experts": "stacked" if c.expert_rank is None else "factorised"}
    moe |= {"bias_rate": (config.moe.bias_rate or 0.001) if c.router_bias else 0.0, "centroids": None}  # are weights
    if c.router_select != "expert_choice" and c.router_overflow == "none":
        moe["capacity_start"] = None
    if c.num_experts != config.moe.num_experts:
        moe["domain_weight"] = 0.0
    if c.router_weights == "one":
        moe |= {"balance_weight": 0.0, "z_weight": 0.0}
    if c.moe_blocks != "none":  # what made dense layers sparse has done its work
        moe["hoyer_weight"] = 0.0
    if c.router_kind != "prototype":
        moe |= {name: getattr(MoEConfig, name) for name in ("contrastive_weight", "contrastive_temperature")}
    sections = {}
    for name in ("model", "moe", "objective"):
        fields = {field.name: KEYS.get(field.name, field.name) for field in dataclasses.fields(getattr(config, name))}
        told = {field: c[key] for field, key in fields.items() if key in c}
        sections[name] = dataclasses.replace(getattr(config, name), **told, **(moe if name == "moe" else {}))
    return dataclasses.replace(config, **sections)


def dense_layers(net: DiTMoETransformer2DModel, blocks: str) -> dict[str, FeedForward]:
    """By block, `blocks.3`, the dense layers that `blocks` makes layers with experts. ValueError where some have."""
    if net.config.moe_blocks != "none":
        raise ValueError(f"the model has experts already (moe_blocks {net.config.moe_blocks}); give its dense twin")
    layers = {
        f"blocks.{i}": cast("FeedForward", block.mlp) for i, block in enumerate(net.blocks) if has_experts(blocks, i)
    }
    if not layers:
        raise ValueError(f"blocks is {blocks}, and none of the model's {len(net.blocks)} would have experts; give all")
    return layers


def routed_layers(net: DiTMoETransformer2DModel, what: str) -> list[MoELayer]:
    """The layers with experts. ValueError where there are none to `what`, or they are factorised."""
    layers = [module for module in net.modules() if isinstance(module, MoELayer)]
    if not layers:
        raise ValueError(f"there are no experts to {what}: the model is dense; --upcycle or --split make some")
    if net.config.expert_rank is not None:
        raise ValueError(f"experts to {what} must have matrices of their own, and the model's are factorised")
    return layers


def per_expert(net: DiTMoETransformer2DModel) -> dict[str, Tensor]:
    """The tensors of the network that have a row or matrix an expert: of routed experts and of what routes to them."""
    found, state = dict[str, Tensor](), net.state_dict()
    for path, module in net.named_modules():
        if isinstance(module, MoELayer):
            found |= {f"{path}.experts.{name}": state[f"{path}.experts.{name}"] for name in ("w_in", "w_out")}
        elif isinstance(module, Router) and (path.endswith(".moe.router") or path == "router"):
            names = [f"{path}.{name}" for name in ("weight", "offset", "expert_bias")]
            found |= {name: state[name] for name in names if name in state}
    return found


def same_tau(net: DiTMoETransformer2DModel) -> dict[str, float | None]:
    """The setting that keeps the rule's tau, whose default hangs on the number of experts under select threshold."""
    least = net.rule.least(net.config.num_experts) if net.rule.kind == "threshold" else net.config.router_tau
    return {"router_tau": least}


def with_experts(
    net: DiTMoETransformer2DModel, blocks: str, units: Sequence[tuple[Tensor, Tensor]], routers: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> DiTMoETransformer2DModel:  # fmt: skip
    """The dense network with experts in some `blocks`, made of hidden units of the layers there; routing as in `TOPK`.

    `units`: of each layer those of its experts (E, F), and of the shared one (S,), which has the output's bias too: of
    none it is nothing, or `SILENT` units that give 0 beside the bias. `settings`: where routing is otherwise.
    """
    weights = dict(routers)
    for (name, layer), (own, common) in zip(dense_layers(net, blocks).items(), units, strict=True):
        weights |= {f"{name}.moe.{key}": value for key, value in _parts(layer, own, common).items()}
    (E, F), gelu = own.shape, net.config.activation == "gelu"
    sizes = {"num_experts": E, "expert_width": F, "shared_width": len(common) or SILENT * gelu, "expert_biases": gelu}
    return rebuilt(net, weights, {**TOPK, "moe_blocks": blocks, **sizes, **settings})


def _parts(layer: FeedForward, own: Tensor, common: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer's experts, where it has biases of D + 8 inputs, and of its shared one."""
    bias, w_out = layer.fc1.bias, layer.fc2.weight  # (D, H)
    w_in = first = layer.fc1.weight.view(-1, *w_out.T.shape)  # (m, H, D)
    if bias is not None:  # as weights of 8 inputs of 1/8
        first = torch.cat([w_in, bias.view(-1, w_in.shape[1], 1).expand(-1, -1, 8)], dim=2)
    parts = {"experts.w_in": first[:, own].transpose(0, 1).flatten(1, 2)}
    parts["experts.w_out"] = w_out[:, own].transpose(0, 1)
    silent = len(common) == 0
    if silent and bias is None:
        return parts
    common = torch.arange(SILENT) % w_in.shape[1] if silent else common
    parts |= {"shared.fc1.weight": w_in[:, common].flatten(0, 1), "shared.fc2.weight": w_out[:, common] * (not silent)}
    return parts if bias is None else parts | {"shared.fc1.bias": bias[common], "shared.fc2.bias": layer.fc2.bias}

"""Named rules of routing, `--moe.preset NAME`: what a paper's experts are, in terms of our options.

Each is what it changes of E experts of width F, K a token, and keeps how many parameters a token activates.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .sections import Config

Changes = Mapping[str, Any]
Rule = Callable[[int, int, int], Changes]
NUMBERS = ("num_experts", "top_k", "expert_width")  # E, K, F


def _constant(**changes: Any) -> Rule:
    return lambda E, K, F: changes


FACTORISED: Changes = {
    "experts": "factorised", "select": "dense", "score": "entmax", "renormalize": False, "scale": None, "top_k": 1,
    "router_input": "token", "balance_weight": 0.0, "bias_rate": 0.0, "backend": "auto",
}  # fmt: skip
RULES: dict[str, Rule] = {
    # DiT-MoE (arXiv 2407.11633): softmax, its K largest as they are
    "dit-moe": _constant(router_input="token", score="softmax", renormalize=False, scale=None, balance_weight=0.005),
    # DeepSeek-V3 (arXiv 2412.19437): sigmoids, biases for balance, groups of experts
    "deepseek": _constant(
        router_input="token", score="sigmoid", bias_rate=0.001, balance_weight=0.0001, groups=4, top_groups=2
    ),
    # Switch Transformer (arXiv 2101.03961): jitter; DeepSpeed-MoE (arXiv 2109.10465): overflow at random
    "switch": _constant(router_input="token", jitter=0.01, overflow="random", capacity=1.25),
    "overflow-order": _constant(router_input="token", overflow="order", capacity=1.25),
    # Expert Choice (arXiv 2202.09368) inside one image, as EC-DiT (arXiv 2410.02098)
    "expert-choice": _constant(
        router_input="token", select="expert_choice", score="softmax", bias_rate=0.0, balance_weight=0.0
    ),
    # Nucleus-Image (arXiv 2604.12163): expert choice by [unmodulated token, time], capacity falling to its end
    "nucleus": lambda E, K, F: {
        "select": "expert_choice",
        "router_input": "plain+time",
        "balance_weight": 0.0,
        "bias_rate": 0.0,
        "capacity_start": 2.0 * K,
    },
    # D2DMoE (arXiv 2310.04361), rule dynk_max, and its variant by cumulative share; biases hold the K
    "relative": lambda E, K, F: {
        "router_input": "token",
        "select": "relative",
        "tau": 0.12,
        "bias_rate": 0.001 * (K > 1),
    },
    "top-p": lambda E, K, F: {
        "router_input": "token",
        "select": "top_p",
        "score": "softmax",
        "tau": max(0.45, K / E),
        "bias_rate": 0.001 * (K > 1),
    },
    "threshold": _constant(router_input="token", score="sigmoid", select="threshold", bias_rate=0.001),
    # DiffMoE (arXiv 2503.14487): thresholds that follow the load, without its choice over a batch
    "diffmoe": _constant(router_input="token", score="sigmoid", select="threshold", bias_rate=0.01, balance_weight=0.0),
    # AdaMoE (arXiv 2406.13233): as many null experts as experts, twice as many choices
    "null": lambda E, K, F: {"router_input": "token", "null_experts": E, "top_k": 2 * K},
    # RAPHAEL (arXiv 2305.18295), time-MoE: the experts of an image are those of its time
    "time": _constant(router_input="time"),
    # Read-ME (arXiv 2410.19123): one decision for all layers, known before the first step
    "pre-gate": _constant(router_input="time+label", scope="shared"),
    # Moirai-MoE (arXiv 2410.10469): centres of a trained model's tokens; needs --moe.centroids FILE
    "centroid": _constant(router="centroid", router_input="plain", score="softmax", balance_weight=0.0),
    # Time-MoE (arXiv 2409.16040): the shared expert is gated, balance is of all layers together
    "time-moe": _constant(router_input="token", shared_gate=True, balance_over="model", score="softmax"),
    # SwitchHead (arXiv 2312.07987): 2 of 4 maps to values and to outputs a head. It has fewer and narrower heads, which
    # --model.num-heads and --model.head-width say: with as many and as wide ones a block activates 2 D^2 more
    "switchhead": _constant(attention_experts=4, attention_top_k=2),
    # ProMoE (arXiv 2510.24711): prototypes, held at their experts' tokens by a contrastive loss
    "promoe": _constant(router="prototype", router_input="plain", contrastive_weight=1.0, balance_weight=0.0),
    # muMoE (arXiv 2402.12550), CP form: all experts at once, in factors with the parameters of the K that were active
    "mumoe": lambda E, K, F: {**FACTORISED, "expert_width": K * F},
}


def changes(config: Config, name: str, **numbers: int) -> dict[str, Any]:
    """What the named rule makes of options of the section `moe`.

    Args:
        config: Whose num_experts, top_k and expert_width the rule goes by.
        name: One of RULES.
        numbers: Of the same names, instead of the configuration's.
    """
    known = {key: numbers.get(key, getattr(config.moe, key)) for key in NUMBERS}
    return {**known, **RULES[name](*known.values())}


def with_rule(config: Config, name: str) -> Config:
    """The configuration with the named rule. ValueError where it cannot go with the rest."""
    return replace(config, moe=replace(config.moe, **changes(config, name)))

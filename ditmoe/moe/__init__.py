"""Mixture-of-experts layers: torch only, independent of the rest of the project."""

from .experts import Experts, FeedForward
from .layer import MoELayer, Routing
from .losses import balance_loss, balanced_bias, contrastive_loss, domain_loss, z_loss
from .router import Condition, Input, Kind, Router
from .select import Plan, RoutingRule, Score, plan_of, select

__all__ = [
    "Condition", "Experts", "FeedForward", "Input", "Kind", "MoELayer", "Plan", "Router", "Routing", "RoutingRule",
    "Score", "balance_loss", "balanced_bias", "contrastive_loss", "domain_loss", "plan_of", "select", "z_loss",
]  # fmt: skip

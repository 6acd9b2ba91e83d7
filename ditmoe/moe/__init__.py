"""Mixture-of-experts layers: torch only, independent of the rest of the project."""

from .experts import Experts, FeedForward
from .layer import MoELayer, Routing
from .losses import balance_loss, balanced_bias, z_loss
from .router import Condition, Input, Router
from .select import Plan, RoutingRule, plan_of, select

__all__ = [
    "Condition", "Experts", "FeedForward", "Input", "MoELayer", "Plan", "Router", "Routing", "RoutingRule",
    "balance_loss", "balanced_bias", "plan_of", "select", "z_loss",
]  # fmt: skip

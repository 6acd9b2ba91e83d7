"""Mixture-of-experts layers: torch only, independent of the rest of the project."""

from .experts import Experts, FeedForward
from .layer import MoELayer, Routing
from .losses import balance_loss, balanced_bias, z_loss
from .router import Router
from .select import Plan, RoutingRule, Selection, select

__all__ = [
    "Experts",
    "FeedForward",
    "MoELayer",
    "Plan",
    "Router",
    "Routing",
    "RoutingRule",
    "Selection",
    "balance_loss",
    "balanced_bias",
    "select",
    "z_loss",
]

"""Mixture-of-experts layers: torch and the routing rule, independent of the rest of the project."""

from ..config.rule import RoutingRule
from .attention import AttentionExperts
from .experts import Experts, FeedForward
from .factorised import FactorisedExperts
from .layer import MoELayer, Routing, decide
from .losses import balance_loss, balanced_bias, contrastive_loss, domain_loss, whole_balance_loss, z_loss
from .policy import Steering
from .router import Condition, Input, Kind, Router
from .select import Plan, Selection, entmax, plan_of, select

__all__ = [
    "AttentionExperts", "Condition", "Experts", "FactorisedExperts", "FeedForward", "Input", "Kind", "MoELayer", "Plan",
    "Router", "Routing", "RoutingRule", "Selection", "Steering", "balance_loss", "balanced_bias", "contrastive_loss",
    "decide", "domain_loss", "entmax", "plan_of", "select", "whole_balance_loss", "z_loss",
]  # fmt: skip

"""What a call tells the routers: a policy for single experts by sampling step, another tau by time.

Shapes: N images, S sampling steps, B blocks, E experts, Z null experts behind them, R rows with a decision.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..config.policy import Policy as Policy

if TYPE_CHECKING:
    from .layer import Routing

Spans = Sequence[tuple[float, float, float]]
StepEnd = Callable[[int, Tensor, Tensor], Tensor]
_FAR = -1e4  # a logit of which every score is 0


class Steering(NamedTuple):
    """What a call tells the routers.

    Attributes:
        tau: (N,) or a number: instead of the routing rule's own.
        bias: (B, E + Z) float32, at a block its own (E + Z,): see `steered`. Of the rule dense -inf alone counts.
    """

    tau: Tensor | float | None = None
    bias: Tensor | None = None

    def at(self, block: int) -> Self:
        """What the routers of a block are told."""
        return self if self.bias is None else self._replace(bias=self.bias[block])


def steered(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (R, E + Z) with a bias (E + Z,) added, for the rule to go on with: weights follow them as ever.

    At -inf an expert's scores are 0, and those of the others as of a router without it; at +inf its logit becomes the
    row's largest, so that it counts as much as the best one. Of a bias of zeros they are the same to the bit.
    """
    if bias is None:
        return logits
    always = bias == math.inf
    logits = (logits + bias.masked_fill(always, 0.0).to(logits.dtype)).clamp_min(_FAR)
    return torch.where(always, logits.amax(dim=-1, keepdim=True), logits)


def table(policy: Policy, net: Any, steps: int = 1) -> Tensor:
    """Biases (S, B, E + Z) of a call of so many steps. ValueError where the network cannot follow the policy."""
    layers = [i for i, block in enumerate(net.blocks) if hasattr(block, "moe")]
    policy.check(net.rule, layers, net.config.num_experts, steps)
    bias = torch.zeros(steps, len(net.blocks), net.config.num_experts + net.rule.null_experts)
    for one in policy.rules:
        first, last = one.steps or (0, steps)
        bias[first : last + 1, one.layer, one.expert] = one.value
    return bias


class Steered(nn.Module):
    """A network in one call: its routers follow a policy, and have another tau at some times.

    Where they do neither, a layer's router that sees the place alone decides once: weights may not change meanwhile.

    Args:
        net: The network.
        policy: What becomes of single experts.
        spans: (lowest t, highest t, tau): the last with t counts; where none has it, tau is the rule's own.
        steps: S of the call.

    Attributes:
        step: The sampling step, which `after` counts.

    Raises:
        ValueError: The network cannot follow the policy, its rule has no tau, or a span is none.
    """

    def __init__(
        self, net: nn.Module, policy: Policy | None = None, spans: Spans | None = None, steps: int = 1
    ) -> None:  # fmt: skip
        super().__init__()
        self.net, self.config, self.spans, self.step = net, cast("Any", net.config), [*(spans or ())], 0
        self.decided: dict[tuple[int, ...], Routing | None] = {}
        rule = self.rule = cast("Any", net).rule
        if spans is not None and not rule.has_tau:
            raise ValueError(
                f"tau is for models that select relative, top_p or threshold; this one selects {rule.kind}"
            )
        for low, high, tau in self.spans:
            if not (0 <= low <= high <= 1000 and rule.allows(tau)):
                raise ValueError(
                    f"tau {low:g}-{high:g}={tau:g} must have times within 0..1000, and a tau that {rule.kind} takes"
                )
        self.table = table(policy, net, steps) if policy is not None and policy.rules else None

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        """As of the network."""
        if self.table is None and not self.spans:
            return self.net(x, t, class_labels, decided=self.decided)
        bias = None if self.table is None else self.table[self.step].to(x.device, copy=True)
        return self.net(x, t, class_labels, steering=Steering(self._tau(x, t) if self.spans else None, bias))

    def _tau(self, x: Tensor, t: Tensor) -> Tensor:
        own = self.rule.share if self.rule.kind != "threshold" else self.rule.least(self.config["num_experts"])
        times = torch.as_tensor(t, device=x.device).float().expand(len(x))
        tau = torch.full_like(times, own)
        for low, high, value in self.spans:
            tau = torch.where((times >= low) & (times <= high), value, tau)
        return tau

    def after(self, then: StepEnd) -> StepEnd:
        """`then`, an `on_step_end` of `samplers.sample`, which before it tells the network the step to come."""

        def end(k: int, t: Tensor, x: Tensor) -> Tensor:
            self.step = k + 1
            return then(k, t, x)

        return end

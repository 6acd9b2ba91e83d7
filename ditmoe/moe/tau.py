"""Another tau while drawing: a rule's threshold as a function of the network's time.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Spans = Sequence[tuple[float, float, float]]


class WithTau(nn.Module):
    """A network whose routing rule has another tau: that of the last of the spans (lowest t, highest t, tau) with t.

    Where no span has the time, tau is the rule's own. It holds no weights of its own.

    Raises:
        ValueError: The rule of the network has no tau, or a span is none.
    """

    def __init__(self, net: nn.Module, spans: Spans) -> None:
        super().__init__()
        self.net, self.config, self.spans = net, cast("Any", net.config), [*spans]
        rule = cast("Any", net).rule
        if not rule.has_tau:
            raise ValueError(
                f"tau is for models that select relative, top_p or threshold; this one selects {rule.kind}"
            )
        for low, high, tau in self.spans:
            if not (0 <= low <= high <= 1000 and rule.allows(tau)):
                raise ValueError(
                    f"tau {low:g}-{high:g}={tau:g} must have times within 0..1000, and a tau that {rule.kind} takes"
                )
        self.own = rule.share if rule.kind != "threshold" else rule.least(self.config["num_experts"])

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        """As of the network."""
        times = torch.as_tensor(t, device=x.device).float().expand(len(x))
        tau = torch.full_like(times, self.own)
        for low, high, value in self.spans:
            tau = torch.where((times >= low) & (times <= high), value, tau)
        return self.net(x, t, class_labels, tau=tau)

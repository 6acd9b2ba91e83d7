"""The mixture-of-experts layer: router, selection, experts, shared expert, and a record of what was decided.

Shapes: N images, T tokens of an image, D width, E experts, in logits and counts with null experts behind them; n images
and t tokens with a decision of their own, each all of them or 1; R = n * t rows that share a decision, B = N T / R
tokens of each; I inputs of the router.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..config.rule import RoutingRule
from .experts import Experts, FeedForward
from .factorised import FactorisedExperts
from .kernels import autocast_dtype
from .policy import Steering, steered
from .router import Condition, Input, Kind, Router
from .select import Plan, select


class Routing(NamedTuple):
    """What one layer's router did with one batch. Losses, logs and pictures are functions of it.

    Attributes:
        logits: (R, E) float32, a row a decision.
        scores: (R, E) float32, softmax, entmax or sigmoid of the logits, or they themselves.
        plan: Who serves whom: (row, expert) pairs. None where nobody is chosen and the scores are all experts' weights.
        counts: (E,) int64, tokens that chose each expert, or were chosen by it, or give it a weight above 0: B a row.
        images: n, images with decisions of their own: N, or 1 where all share them.
        prototypes: (E, I D) float32, of length 1, where the router has such.
        sums: (E, I D) float32, where it has: of each expert's rows the sum of what the router saw. Its direction is
            their mean's.
    """

    logits: Tensor
    scores: Tensor
    plan: Plan | None
    counts: Tensor
    images: int
    prototypes: Tensor | None = None
    sums: Tensor | None = None

    def served(self) -> Tensor:
        """(n, t, E) int64: 1 where an expert serves a row, by a weight above 0 where all do."""
        R, E = self.logits.shape
        if self.plan is None:
            return (self.scores > 0).long().view(self.images, -1, E)
        cells = torch.bincount(self.plan.row * E + self.plan.expert, minlength=R * E)
        return cells.view(self.images, -1, E)


def decide(
    router: Router, rule: RoutingRule, x: Tensor, condition: Condition | None, capacity: float | None
) -> Routing:
    """Who serves the tokens x (N, T, D). Changes no state. `capacity`: instead of the rule's own."""
    N, T, _ = x.shape
    random = rule.overflow == "random" or (router.jitter > 0 and router.training)
    keys = condition.keys(router.salt) if random and condition is not None else None
    seen = router.seen(x, condition)
    logits, prototypes = router(seen, keys)
    told, bias = Steering() if condition is None or condition.steering is None else condition.steering
    if told is not None:  # it may differ where images share their logits
        logits = logits.expand(N, -1, -1)
    n, t, E = logits.shape
    logits = steered(logits.reshape(n * t, E), None if rule.kind == "dense" else bias)
    tau = (
        None if told is None else torch.as_tensor(told, device=x.device).float().expand(N).repeat_interleave(t)[:, None]
    )
    scores, plan, counts = select(
        logits, rule, router.expert_bias, images=n, keys=keys, tau=tau, capacity=capacity, policy=bias
    )
    shared = N * T // max(1, n * t)  # tokens that share a row's decision
    routing = Routing(logits, scores, plan, counts * shared, n, prototypes)
    return routing if prototypes is None else routing._replace(sums=_sums(seen, routing, (n, t, E)))


class MoELayer(nn.Module):
    """y = sum over its experts e of w_e Expert_e(x) + Shared(x), for every token x.

    Args:
        hidden_size: Width D.
        num_experts: Routed experts E, without null experts.
        expert_width: Hidden width of a routed expert.
        shared_width: Hidden width of the shared expert; 0 for none.
        rule: The routing rule.
        activation: Of all experts.
        kind: The router's, see `Router`.
        inputs: What the router looks at, which decides who shares a decision, see `Router`.
        positions: (T, D), for the router's input "position".
        with_bias: Keep a balancing bias in the router.
        backend: Expert kernels, see `Experts`.
        cosine_scale: Of a prototype router; None: 1 where cosines are weights themselves (score "identity"), else the
            router's default.
        jitter: The router's, see `Router`.
        shared_gate: Multiply the shared expert's output by sigmoid(w x), w (D,) learnt and zero at the start.
        own_router: False where all layers share one, whose decision then comes with the condition.
        rank: Of factorised experts, see `FactorisedExperts`, which the rule `dense` has; None for stacked ones.
        biases: Of stacked experts, see `Experts`.

    Attributes:
        capacity: Instead of the rule's, where training anneals it.

    Raises:
        ValueError: More or fewer experts a token than there are, or groups that do not divide them.

    Source: DiT-MoE (arXiv 2407.11633) eq. 3-4; shared experts: DeepSeekMoE (arXiv 2401.06066), their gate: Time-MoE
    (arXiv 2409.16040) eq. 4; one router for all layers: Read-ME (arXiv 2410.19123).
    """

    def __init__(
        self, hidden_size: int, *, num_experts: int, expert_width: int, shared_width: int, rule: RoutingRule,
        activation: Literal["swiglu", "gelu"] = "swiglu", kind: Kind = "linear", inputs: Sequence[Input] = ("token",),
        positions: Tensor | None = None, with_bias: bool = False,
        backend: Literal["auto", "grouped", "loop"] = "auto", cosine_scale: float | None = None,
        jitter: float = 0.0, shared_gate: bool = False, own_router: bool = True, rank: int | None = None,
        biases: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        rule.check(num_experts)
        if (rule.kind == "dense") != (rank is not None):
            raise ValueError(f"rank is {rank} and the rule {rule.kind}; dense has one, as for factorised experts alone")
        self.rule = rule
        self.capacity: float | None = None
        self.router = None
        if own_router:
            self.router = Router(
                hidden_size,
                num_experts + rule.null_experts,
                kind=kind,
                inputs=inputs,
                positions=positions,
                with_bias=with_bias,
                cosine_scale=1.0 if cosine_scale is None and rule.score == "identity" else cosine_scale,
                jitter=jitter,
            )
        self.experts: Experts | FactorisedExperts
        if rank is None:
            active = max(1, round(rule.scale * expert_width)) if rule.renormalize else expert_width  # K F at scale K
            self.experts = Experts(hidden_size, num_experts, expert_width, activation, backend, active, biases)
        else:
            self.experts = FactorisedExperts(hidden_size, num_experts, expert_width, rank, activation)
        self.shared = FeedForward(hidden_size, shared_width, activation) if shared_width else None
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if shared_gate and shared_width else None

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Routing]:
        """x (N, T, D) -> y (N, T, D) of x's dtype or autocast's, and the record. Changes no state."""
        N, T, D = x.shape
        routing = None if condition is None else condition.routing
        if routing is None:
            assert self.router is not None, "the shared router's decision is missing"
            routing = decide(self.router, self.rule, x, condition, self.capacity)
        n, R = routing.images, len(routing.logits)
        t = R // n if n else 1
        images, places = N // n if n else 1, T // t if t else 1  # that share a decision
        tokens = x.to(autocast_dtype(x)).view(n, images, t, places, D)
        rows = tokens.transpose(1, 2).reshape(R, images * places, D)  # (R, B, D)
        y = self.experts(rows, routing.scores if routing.plan is None else routing.plan)
        y = y.view(n, t, images, places, D).transpose(1, 2).reshape(N, T, D)
        return y if self.shared is None else self._shared(tokens.view(N, T, D)) + y, routing

    def _shared(self, x: Tensor) -> Tensor:
        """The shared expert's part, gated where there is a gate."""
        assert self.shared is not None
        y: Tensor = self.shared(x)
        return y if self.shared_gate is None else y * self.shared_gate(x).float().sigmoid().to(y.dtype)

    def without_routed(self, x: Tensor) -> Tensor:
        """Shared(x) alone, x (N, T, D) -> (N, T, D): zero where there is none. Neither router nor experts are run."""
        x = x.to(autocast_dtype(x))
        return torch.zeros_like(x) if self.shared is None else self._shared(x)


def _sums(seen: Sequence[Tensor], routing: Routing, shape: tuple[int, int, int]) -> Tensor:
    """Of each expert's rows, the sum of what the router saw (each (n or 1, t or 1, D)): (E, I D)."""
    n, t, E = shape
    chosen, plan = seen[0].new_zeros(n * t, E), routing.plan
    if plan is None:
        chosen += routing.scores > 0
    else:
        chosen[plan.row, plan.expert] = 1.0
    with torch.autocast(chosen.device.type, enabled=False):
        return torch.cat([torch.einsum("nte,ntd->ed", chosen.view(shape), z) for z in seen], dim=1)

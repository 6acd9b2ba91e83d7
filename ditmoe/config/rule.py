"""How rows of router logits and experts find each other: the rule, and what cannot go together. Imports no torch."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

RouterScore = Literal["sigmoid", "softmax", "entmax", "identity"]
SelectKind = Literal["topk", "expert_choice", "relative", "top_p", "threshold", "dense"]
Overflow = Literal["none", "order", "random"]
Weights = Literal["scores", "one"]


@dataclass(frozen=True)
class RoutingRule:
    """How rows and experts find each other.

    Args:
        top_k: Experts that serve one row, K; on average, where rows may differ.
        score: How logits become scores s: "softmax" over the experts, "entmax" over them (1.5-entmax, of which many are
            0), an independent "sigmoid" each, or "identity", not at all: for cosines, which are bounded.
        renormalize: Divide a row's chosen scores by their sum.
        scale: Factor on the weights.
        kind: Who is chosen, of scores to which the balancing bias is added:
            "topk": the K best experts of a row.
            "expert_choice": each expert's C = round(capacity t / E) best rows of an image.
            "relative": of a row those with s_e >= (1 - tau) max s, one at least.
            "top_p": the fewest best ones whose scores make up the share tau of their sum.
            "threshold": those with s_e >= tau: any number, none too.
            "dense": nobody is, all experts serve every row with their scores as weights, see `FactorisedExperts`.
        tau: See kind; None: 0.5, and for "threshold" what lets K of E logits of variance 1 pass.
        capacity: expert_choice: experts of a row on average, None: K. With `overflow`: an expert takes at most
            C = ceil(capacity K t / E) rows of an image, None: 1.
        overflow: topk: which of the rows that are too many for an expert go without it: "none" of them, those that come
            last in "order", or ones at "random", other ones at every noise level.
        groups: topk: experts form so many groups of neighbours, of which a row sees
        top_groups: so many, those whose two best scores have the largest sum.
        null_experts: Z choices more, which are chosen as experts are and do nothing.
        weights: Of those chosen: their "scores", or "one": the scores choose alone, and no loss of what experts make
            reaches the router.

    Raises:
        ValueError: What cannot go together, in a sentence.

    Source: expert choice: arXiv 2202.09368, inside one image as in EC-DiT (arXiv 2410.02098); relative: D2DMoE (arXiv
    2310.04361), eq. 8; capacity with random overflow: DeepSpeed-MoE multitask (arXiv 2109.10465); groups: DeepSeek-V3
    (arXiv 2412.19437); null experts: AdaMoE (arXiv 2406.13233).
    """

    top_k: int
    score: RouterScore = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    kind: SelectKind = "topk"
    tau: float | None = None
    capacity: float | None = None
    overflow: Overflow = "none"
    groups: int = 1
    top_groups: int = 1
    null_experts: int = 0
    weights: Weights = "scores"

    def __post_init__(self) -> None:
        plain, by_share = self.kind == "topk", self.kind in ("relative", "top_p")
        tau, identity = self.tau, self.score == "identity"
        negative = "score identity cannot be renormalised: cosines may be negative; add --moe.no-renormalize"
        _refuse(identity and self.renormalize, negative)
        _refuse(self.renormalize and self.weights == "one", "weights one are no scores; add --moe.no-renormalize")
        _refuse(identity and by_share, f"select {self.kind} compares scores above 0, and score identity has others")
        _refuse(tau is not None and not self.has_tau, f"tau does not apply to select {self.kind}")
        _refuse(by_share and not self.allows(self.share), f"tau is {tau}; with select {self.kind} it lies in [0, 1]")
        no_default = self.kind == "threshold" and tau is None and self.score != "sigmoid"
        _refuse(no_default, f"select threshold needs a tau with score {self.score}")
        _refuse(tau is not None and not math.isfinite(tau), f"tau is {tau}; it must be finite")
        limited = self.overflow != "none"
        _refuse(limited and not plain, f"overflow works with select topk, not {self.kind}")
        useless = self.capacity is not None and self.kind != "expert_choice" and not limited
        _refuse(useless, "capacity works with select expert_choice, or with overflow order or random")
        impossible = self.capacity is not None and not 0 < self.capacity < 1e6
        _refuse(impossible, f"capacity is {self.capacity}; it must be above 0")
        _refuse(self.groups > 1 and not plain, f"groups work with select topk, not {self.kind}")
        _refuse(self.groups < 1, f"groups is {self.groups}; it must be 1 or more")
        _refuse(self.null_experts < 0, f"null_experts is {self.null_experts}; it must be 0 or more")
        few = not 1 <= self.top_groups <= self.groups
        _refuse(few, f"top_groups is {self.top_groups}; it must be between 1 and groups {self.groups}")
        ungrouped = self.groups > 1 and self.null_experts > 0
        _refuse(ungrouped, "null_experts belong to no group; leave out one of groups and null_experts")
        beside = self.null_experts > 0 and (self.kind == "threshold" or limited)
        what = "select threshold" if self.kind == "threshold" else f"overflow {self.overflow}"
        _refuse(beside, f"null_experts take no room from experts under {what}; leave one of them out")
        idle = self.null_experts > 0 and self.kind == "expert_choice"
        _refuse(idle, "null_experts choose no tokens, so they do not apply to select expert_choice")
        if self.kind == "dense":
            self._check_dense()

    def check(self, num_experts: int) -> None:
        """ValueError unless the rule can be followed with so many experts."""
        _refuse(self.top_k < 1, f"top_k is {self.top_k}; it must be 1 or more")
        _refuse(self.top_k > num_experts, f"top_k {self.top_k} is more than num_experts {num_experts}")
        beyond = self.kind == "expert_choice" and self.usual_capacity > num_experts
        _refuse(beyond, f"capacity is {self.usual_capacity:g}; a token has at most num_experts {num_experts}")
        size, rest = divmod(num_experts, self.groups)
        _refuse(rest > 0, f"groups is {self.groups}; it must divide num_experts {num_experts}")
        _refuse(
            self.top_k > self.top_groups * size,
            f"top_k is {self.top_k}, but top_groups {self.top_groups} hold {self.top_groups * size} experts",
        )

    def _check_dense(self) -> None:
        sums = self.score in ("softmax", "entmax")
        _refuse(not sums, f"select dense needs scores that sum to 1, and score is {self.score}; add --moe.score entmax")
        _refuse(self.renormalize, "select dense weighs by scores that sum to 1 already; add --moe.no-renormalize")
        _refuse(self.weights == "one", "weights one are of chosen experts, and select dense has nobody chosen")
        _refuse(self.scale != 1, f"scale is {self.scale}; select dense weighs by scores that sum to 1; leave it out")
        _refuse(self.top_k != 1, f"top_k is {self.top_k}, but select dense has nobody chosen; add --moe.top-k 1")
        _refuse(self.null_experts > 0, "null_experts are for choices, and select dense makes none; leave them out")

    def active(self, num_experts: int) -> float:
        """Experts that serve a token on average, at even load."""
        if self.kind == "dense":
            return num_experts
        if self.kind == "expert_choice":
            return self.usual_capacity
        return self.top_k * num_experts / (num_experts + self.null_experts)

    def allows(self, tau: float) -> bool:
        """Whether the rule takes this tau."""
        return math.isfinite(tau) and (self.kind == "threshold" or 0 <= tau <= 1)

    @property
    def steady(self) -> bool:
        """Experts serve as many rows in every batch of one size: what torch.compile does not compile anew."""
        return self.kind in ("topk", "expert_choice", "dense") and self.overflow == "none" and not self.null_experts

    @property
    def has_tau(self) -> bool:
        """Whether tau decides anything."""
        return self.kind in ("relative", "top_p", "threshold")

    @property
    def share(self) -> float:
        """tau, or its default, where it is a share of scores."""
        return 0.5 if self.tau is None else self.tau

    def least(self, num_experts: int) -> float:
        """tau, or its default, where a score must reach it: at the start K of E sigmoids of normal logits do."""
        if self.tau is not None:
            return self.tau
        share = min(max(1 - self.top_k / num_experts, 1e-6), 1 - 1e-6)
        return 1 / (1 + math.exp(-NormalDist().inv_cdf(share)))

    @property
    def usual_capacity(self) -> float:
        """capacity, or its default."""
        if self.capacity is not None:
            return self.capacity
        return float(self.top_k) if self.kind == "expert_choice" else 1.0

    def rows_taken(self, rows: int, num_experts: int, capacity: float | None = None) -> int:
        """C of an image of t rows; `capacity` instead of the rule's own."""
        capacity = self.usual_capacity if capacity is None else capacity
        if self.kind == "expert_choice":
            return min(rows, max(1, round(capacity * rows / num_experts)))
        return min(rows, math.ceil(capacity * self.top_k * rows / num_experts))


def _refuse(condition: bool, sentence: str) -> None:
    if condition:
        raise ValueError(sentence)

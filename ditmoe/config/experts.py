"""The section `moe` of a configuration: routers, who is chosen, experts, losses. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .checks import MOST, at_least, positive, require
from .rule import Overflow, RouterScore, RoutingRule, SelectKind, Weights

RouterInput = Literal[
    "token", "plain", "token+time", "plain+time", "token+position", "plain+position", "position", "label+position",
    "time", "label", "time+label",
]  # fmt: skip
RouterKind = Literal["linear", "mlp", "prototype", "centroid"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts layers."""

    blocks: Literal["all", "every-second", "none"] = "every-second"
    """Which blocks hold experts: every one, blocks 1, 3, 5, ... (from 0), or none (the dense twin)."""
    num_experts: int = 8
    """Routed experts E in a layer."""
    top_k: int = 2
    """Experts K that serve one token; on average, where `select` lets tokens differ."""
    experts: Literal["stacked", "factorised"] = "stacked"
    """Each expert has matrices of its own (stacked), or all have factors in common, which with select dense serve
    every token with any number of experts at nearly the same cost (factorised; muMoE)."""
    rank: int | None = None
    """factorised: factors R of each of the two layers; None: so that all experts together have the parameters of one
    stacked expert."""
    select: SelectKind = "topk"
    """Who serves whom: a token's K best experts (topk); each expert takes its best tokens of an image (expert_choice);
    of a token all experts whose score is (1 - tau) of its best or more (relative), the fewest with the share tau of its
    scores (top_p), all whose score is tau or more (threshold); with bias_rate the biases make it K on average; or all
    experts serve all tokens by their scores (dense, for experts factorised)."""
    tau: float | None = None
    """relative, top_p, threshold: see select. None: 0.5; threshold: what K of E sigmoids reach at the start."""
    capacity: float | None = None
    """expert_choice: experts of a token on average, None: top_k. With overflow: an expert takes at most so many times
    its even share of an image's tokens, None: 1."""
    capacity_start: float | None = None
    """The capacity at the first step, from which it goes linearly to `capacity` at train.decay_steps; None keeps it."""
    overflow: Overflow = "none"
    """topk: who goes without an expert that too many of an image's tokens chose: none, the last, or some at random."""
    groups: int = 1
    """topk: experts in so many groups, of which a token sees the best top_groups."""
    top_groups: int = 1
    """Groups that a token sees."""
    null_experts: int = 0
    """Choices that do nothing, beside num_experts: tokens that take them are served by fewer."""
    expert_width: int = 128
    """Hidden width F of one routed expert."""
    biases: bool = False
    """Routed experts have biases before the activation, as dense gelu layers have (for those made of such layers)."""
    shared_width: int = 128
    """Hidden width of the shared expert that serves every token; 0 leaves it out."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a sigmoid of the token (Time-MoE)."""
    router: RouterKind = "linear"
    """Logits are products with a row of weights an expert (linear), of 128 tanh units between (mlp), cosines to its
    prototype (prototype), or fall with the distance to its centre, which is fitted to a trained model's tokens and
    stays (centroid)."""
    centroids: Path | None = None
    """centroid: the file of the centres, made by python -m ditmoe centroids."""
    scope: Literal["layer", "shared"] = "layer"
    """Every layer decides for itself, or all share the decision of one router, taken before the first block."""
    jitter: float = 0.0
    """In training what the router sees is multiplied by numbers within so much of 1 (Switch Transformer: 0.01)."""
    cosine_scale: float | None = None
    """prototype: factor on the cosines. None: 1 with score identity, else the root of the width of what the
    router sees, so that logits start as those of a linear router do."""
    router_input: RouterInput = "token"
    """What the router looks at, which decides who shares its decision. Each token has its own with token, or plain (the
    token before adaLN modulates it), alone or with the time or its place beside it; position: a place has the same
    experts in every image and at every noise level (for aligned images), label+position: in every image of its class;
    time, label, time+label: all tokens of an image share theirs."""
    score: RouterScore = "sigmoid"
    """How router logits become scores; entmax is a softmax that gives many experts 0 exactly (1.5-entmax); identity
    (ProMoE), not at all, is for a prototype router without renormalize."""
    renormalize: bool = True
    """Divide the K chosen scores by their sum."""
    weights: Weights = "scores"
    """one: scores choose, and the chosen count alike, `scale` each: what a dense layer cut into experts has. The router
    then learns of its own losses alone (balance_weight, z_weight)."""
    scale: float | None = None
    """Factor on the routed experts' weights, after renormalisation. None: where they are renormalised the experts that
    serve a token on average, top_k unless there are null_experts, so that K
    experts of width F have the output and the learning speed of a dense layer of width K F; else 1."""
    attention_experts: int = 0
    """Experts of each head of attention, in every block, for its values and as many for its outputs (SwitchHead: 4 or
    5); 0: dense maps. Fewer heads are wider ones, unless model.head_width says how wide they are."""
    attention_top_k: int = 2
    """Of which so many serve a token, with values and with outputs."""
    balance_weight: float = 0.005
    """Weight of each layer's balance loss (DiT-MoE's alpha: 0.005)."""
    balance_over: Literal["layer", "model"] = "layer"
    """What is to be even: the loads of each layer, or those of all layers together (Time-MoE)."""
    z_weight: float = 0.0
    """Weight of each layer's router z-loss (ST-MoE: 0.001)."""
    contrastive_weight: float = 0.0
    """prototype: weight of each layer's routing contrastive loss (ProMoE: 1), which pulls prototypes and the mean of
    their experts' tokens together, and apart from the others."""
    contrastive_temperature: float = 0.07
    """Of that loss (ProMoE: 0.07)."""
    domain_weight: float = 0.0
    """data.mixture: weight of the domain loss, a mean over layers (DAMEX: 0.1, with balance_weight 0). Experts are cut
    into as many equal sets as there are data sets, and each row's router is told to choose of its own data set's."""
    hoyer_weight: float = 0.0
    """Weight of the sparsity of dense layers in blocks without experts, a mean over them (square Hoyer; D2DMoE): few of
    a layer's units then do something for a token, which is what makes a later split into experts pay."""
    bias_rate: float = 0.0
    """Step of the loss-free balancing bias per optimiser step (DeepSeek-V3: 0.001); 0 leaves it out. With select
    threshold, relative or top_p each expert's load goes to its share of K experts a token (as DiffMoE's thresholds)."""
    backend: Literal["auto", "grouped", "loop"] = "auto"
    """Expert kernels: grouped_mm, a loop, or the first where it applies."""

    def __post_init__(self) -> None:
        positive(self, "num_experts", "top_k", "expert_width")
        positive(self, "contrastive_temperature")
        at_least(self, 0, "shared_width", "balance_weight", "z_weight", "bias_rate", "contrastive_weight")
        at_least(self, 0, "domain_weight", "hoyer_weight")
        whole = self.hoyer_weight and self.blocks == "all"
        require(not whole, "hoyer_weight is for dense layers, and blocks all leaves none; add --moe.blocks none")
        require(self.scale is None or self.scale > 0, f"scale is {self.scale}; it must be above 0")
        self.rule.check(self.num_experts)
        self._check_router()
        self._check_select()
        self._check_held()
        self._check_attention()
        self._check_experts()
        if self.top_k == 1 and self.renormalize and self.select == "topk" and self.blocks != "none":
            raise ValueError(
                "renormalize with top_k 1 makes every weight 1, so the router would not learn; add --moe.no-renormalize"
            )

    @property
    def rule(self) -> RoutingRule:
        """How rows and experts find each other."""
        return RoutingRule(
            self.top_k, self.score, self.renormalize, self.routed_scale, self.select, self.tau, self.capacity,
            self.overflow, self.groups, self.top_groups, self.null_experts, self.weights,
        )  # fmt: skip

    @property
    def routed_scale(self) -> float:
        """The factor on the routed experts' weights that `scale` comes to."""
        null = self.num_experts / (self.num_experts + self.null_experts)
        default = self.top_k * null if self.renormalize else 1.0
        return default if self.scale is None else self.scale

    def _check_router(self) -> None:
        scale, weight = self.cosine_scale, self.contrastive_weight
        require(scale is None or 0 < scale <= MOST, f"cosine_scale is {scale}; it must be above 0, and finite")
        if weight and self.router_input == "position":
            raise ValueError("contrastive_weight needs a router that sees images, and router_input position sees none")
        nulls = "gives data sets experts of their own, and null_experts are none; leave one out"
        require(not (self.domain_weight and self.null_experts), f"domain_weight {nulls}")
        if self.domain_weight and self.router_input in ("position", "time"):
            why = f"router_input {self.router_input} sees neither"
            raise ValueError(f"domain_weight needs a router that sees images or their labels, and {why}; try token")
        require(not (weight and self.null_experts), "contrastive_weight has no means of null_experts; leave one out")
        if self.router != "prototype":
            usual = MoEConfig.contrastive_temperature
            beside = {
                "cosine_scale": scale is not None, "score identity": self.score == "identity",
                "contrastive_weight": weight, "contrastive_temperature": self.contrastive_temperature != usual,
            }  # fmt: skip
            for name, asked in beside.items():
                require(not asked, f"{name} works with router prototype, not {self.router}")
        if self.router != "centroid":
            require(self.centroids is None, f"centroids work with router centroid, not {self.router}")
        if self.scope == "shared" and "token" in self.router_input:
            raise ValueError(
                f"scope shared decides before the first block, so its router cannot look at router_input "
                f"{self.router_input}; add --moe.router-input plain, label+position or time+label"
            )

    def _check_select(self) -> None:
        at_least(self, 0, "jitter")
        even = self.select == "expert_choice"
        require(not (even and self.bias_rate), "bias_rate does not apply to select expert_choice, whose loads are even")
        alike = self.tau == 0 and self.renormalize and self.select in ("relative", "top_p")
        require(not alike, "renormalize with tau 0 makes every weight alike, so the router would not learn; raise tau")
        beyond = self.select == "threshold" and self.tau is not None and self.tau >= 1 and self.score != "identity"
        require(not beyond or self.bias_rate > 0, f"tau is {self.tau}, which no score of {self.score} reaches")
        seen, by_place = self.router_input.split("+"), self.router_input == "position"
        require(self.jitter < 1, f"jitter is {self.jitter}; it must lie in [0, 1)")
        limited, unseen = self.overflow != "none", "needs a router that sees images, and router_input position does not"
        require(not (self.jitter and by_place), f"jitter {unseen}")
        require(not (self.overflow == "random" and by_place), f"overflow random {unseen}")
        if (self.select == "expert_choice" or limited) and not {"token", "plain", "position"} & {*seen}:
            what = "select expert_choice" if self.select == "expert_choice" else f"overflow {self.overflow}"
            raise ValueError(
                f"{what} compares the tokens of an image, which with router_input {self.router_input} share a decision"
            )
        start = self.capacity_start
        if start is not None:
            require(0 < start <= MOST, f"capacity_start is {start}; it must be above 0, and finite")
            needed = self.select == "expert_choice" or limited
            require(needed, "capacity_start works with select expert_choice, or with overflow order or random")
        require(
            not self.shared_gate or self.shared_width > 0, "shared_gate needs a shared expert, and shared_width is 0"
        )

    def _check_held(self) -> None:
        """A token always has its best expert, so K is 2 or more; and K even scores have the share that tau asks for."""
        if not self.bias_rate or self.select not in ("relative", "top_p"):
            return
        K, choices = self.top_k, self.num_experts + self.null_experts
        alone = f"select {self.select} with bias_rate and top_k 1 gives each token one expert, as topk does"
        require(K > 1, f"{alone}; raise top_k, or add --moe.bias-rate 0")
        least = (K - 1) / choices if self.select == "top_p" else 0.0  # of even scores what K - 1 have
        held = f"bias_rate brings experts to top_k {K} with a tau above {least:g}, and tau is {self.rule.share:g}"
        require(self.rule.share > least, f"{held}; raise it, or add --moe.bias-rate 0")

    def _check_attention(self) -> None:
        at_least(self, 0, "attention_experts")
        E, K = self.attention_experts, self.attention_top_k
        usual = MoEConfig.attention_top_k
        require(E > 0 or usual == K, f"attention_top_k {K} needs --moe.attention-experts, and there are none")
        require(E == 0 or 1 <= K <= E, f"attention_top_k is {K}; it must be between 1 and attention_experts {E}")

    def factors(self, hidden_size: int, activation: str) -> int:
        """R of factorised experts for tokens of width D: `rank`, or what has the parameters of a stacked expert."""
        D, F, inner = hidden_size, self.expert_width, (2 if activation == "swiglu" else 1) * self.expert_width
        sides = 2 * self.num_experts + (D + 1 + inner) + (F + 1 + D)  # parameters a factor of both layers has
        return self.rank or max(1, round((D * inner + F * D) / sides))

    def _check_experts(self) -> None:
        positive(self, *(["rank"] if self.rank is not None else []))
        dense, factorised = self.select == "dense", self.experts == "factorised"
        together = f"serve a token all together, and select is {self.select}; add --moe.select dense"
        require(dense or not factorised, f"experts factorised {together}, or take --moe.preset mumoe")
        require(factorised or not dense, "select dense works with experts factorised; take --moe.preset mumoe")
        require(not (factorised and self.biases), "biases is for experts stacked; factorised ones have their own")
        require(factorised or self.rank is None, "rank works with experts factorised, not stacked")
        if factorised:
            require(self.backend == "auto", f"backend {self.backend} does not apply to experts factorised")
            for name in ("balance_weight", "bias_rate"):
                flag, value = name.replace("_", "-"), getattr(self, name)
                why = f"{name} is {value}, but with experts factorised there is no load to balance"
                require(not value, f"{why}; add --moe.{flag} 0")


def has_experts(blocks: str, index: int) -> bool:
    """Whether block `index` (from 0) holds experts where `moe.blocks` is `blocks`."""
    return blocks == "all" or (blocks == "every-second" and index % 2 == 1)

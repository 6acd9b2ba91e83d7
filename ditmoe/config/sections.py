"""What a run is: frozen dataclasses and their checks. Imports no torch.

A run's `config.json` is this tree. Every value is in the unit its docstring names; "steps" are optimiser steps and
batch sizes are global (over all processes and accumulation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .rule import Overflow, RouterScore, RoutingRule, SelectKind

MOST = 1e30  # of a number; one step below what float32 cannot hold
RouterInput = Literal[
    "token", "plain", "token+time", "plain+time", "token+position", "plain+position", "position", "label+position",
    "time", "label", "time+label",
]  # fmt: skip
RouterKind = Literal["linear", "prototype", "centroid"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer around the experts."""

    sample_size: int = 8
    """Height and width of an image (or latent), in pixels."""
    in_channels: int = 1
    """Channels of an image (or latent)."""
    num_classes: int | None = None
    """Number of classes; 0 trains without labels; None takes what the data set has."""
    patch_size: int = 2
    """Height and width of a token, in pixels."""
    hidden_size: int = 128
    """Width D of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads."""
    ffn_width: int = 384
    """Hidden width of the feed-forward layer in blocks without experts."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Of experts and dense feed-forward layers; swiglu has three matrices, gelu (tanh form) has two."""
    positions: Literal["rope", "sincos"] = "rope"
    """2-D rotary positions in attention, or DiT's fixed sine-cosine table added to the tokens."""
    qk_norm: Literal["rms", "layer", "none"] = "rms"
    """Normalisation of queries and keys, per head."""
    refine_width: int = 0
    """Channels of three 3x3 convolutions over pixels that end the network, across the seams of patches; 0 leaves them
    out, as DiT does."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        _positive(self, "sample_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "ffn_width")
        at_least(self, 0, "refine_width")
        size, patch, width, quarters = self.sample_size, self.patch_size, self.hidden_size, 4 * self.num_heads
        if self.num_classes is not None and self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; it must be 0 (unconditional) or more")
        _require(size % patch == 0, f"sample_size {size} is not a multiple of patch_size {patch}")
        if width % quarters:
            raise ValueError(
                f"hidden_size {width} must be a multiple of 4 * num_heads = {quarters}, so that a head splits into two "
                f"rotary halves for two axes"
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts layers."""

    blocks: Literal["all", "every-second", "none"] = "every-second"
    """Which blocks hold experts: every one, blocks 1, 3, 5, ... (from 0), or none (the dense twin)."""
    num_experts: int = 8
    """Routed experts E in a layer."""
    top_k: int = 2
    """Experts K that serve one token; on average, where `select` lets tokens differ."""
    select: SelectKind = "topk"
    """Who serves whom: a token's K best experts (topk); each expert takes its best tokens of an image (expert_choice);
    of a token all experts whose score is (1 - tau) of its best or more (relative), the fewest with the share tau of its
    scores (top_p), all whose score is tau or more (threshold; with bias_rate the biases make it K on average)."""
    tau: float | None = None
    """relative, top_p, threshold: see select. None: 0.5; threshold: what K of E sigmoids reach at the start."""
    capacity: float | None = None
    """expert_choice: experts of a token on average, None: top_k. With overflow: an expert takes at most so many times
    its even share of an image's tokens, None: 1."""
    capacity_start: float | None = None
    """The capacity at the first step, from which it goes linearly to `capacity` at max_steps; None keeps it."""
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
    shared_width: int = 128
    """Hidden width of the shared expert that serves every token; 0 leaves it out."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a sigmoid of the token (Time-MoE)."""
    router: RouterKind = "linear"
    """Logits are products with a row of weights an expert (linear), cosines to its prototype (prototype), or fall with
    the distance to its centre, which is fitted to a trained model's tokens and stays (centroid)."""
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
    """How router logits become scores; identity (ProMoE), not at all, is for a prototype router without renormalize."""
    renormalize: bool = True
    """Divide the K chosen scores by their sum."""
    scale: float | None = None
    """Factor on the routed experts' weights, after renormalisation. None: where they are renormalised the experts that
    serve a token on average, top_k unless there are null_experts, so that K
    experts of width F have the output and the learning speed of a dense layer of width K F; else 1."""
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
    bias_rate: float = 0.0
    """Step of the loss-free balancing bias per optimiser step (DeepSeek-V3: 0.001); 0 leaves it out. With select
    threshold each expert's load goes to its share of K experts a token (as DiffMoE's running thresholds do)."""
    backend: Literal["auto", "grouped", "loop"] = "auto"
    """Expert kernels: grouped_mm, a loop, or the first where it applies."""

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "top_k", "expert_width")
        _positive(self, "contrastive_temperature")
        at_least(self, 0, "shared_width", "balance_weight", "z_weight", "bias_rate", "contrastive_weight")
        at_least(self, 0, "domain_weight")
        _require(self.scale is None or self.scale > 0, f"scale is {self.scale}; it must be above 0")
        _require(self.top_k <= self.num_experts, f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        self.rule.check(self.num_experts)
        self._check_router()
        self._check_select()
        if self.top_k == 1 and self.renormalize and self.select == "topk" and self.blocks != "none":
            raise ValueError(
                "renormalize with top_k 1 makes every weight 1, so the router would not learn; add --moe.no-renormalize"
            )

    @property
    def rule(self) -> RoutingRule:
        """How rows and experts find each other."""
        return RoutingRule(
            self.top_k, self.score, self.renormalize, self.routed_scale, self.select, self.tau, self.capacity,
            self.overflow, self.groups, self.top_groups, self.null_experts,
        )  # fmt: skip

    @property
    def routed_scale(self) -> float:
        """The factor on the routed experts' weights that `scale` comes to."""
        null = self.num_experts / (self.num_experts + self.null_experts)
        default = self.top_k * null if self.renormalize else 1.0
        return default if self.scale is None else self.scale

    def _check_router(self) -> None:
        scale, weight = self.cosine_scale, self.contrastive_weight
        _require(scale is None or 0 < scale <= MOST, f"cosine_scale is {scale}; it must be above 0, and finite")
        if weight and self.router_input == "position":
            raise ValueError("contrastive_weight needs a router that sees images, and router_input position sees none")
        if self.domain_weight and self.router_input in ("position", "time"):
            why = f"router_input {self.router_input} sees neither"
            raise ValueError(f"domain_weight needs a router that sees images or their labels, and {why}; try token")
        _require(not (weight and self.null_experts), "contrastive_weight has no means of null_experts; leave one out")
        if self.router != "prototype":
            usual = MoEConfig.contrastive_temperature
            beside = {
                "cosine_scale": scale is not None, "score identity": self.score == "identity",
                "contrastive_weight": weight, "contrastive_temperature": self.contrastive_temperature != usual,
            }  # fmt: skip
            for name, asked in beside.items():
                _require(not asked, f"{name} works with router prototype, not {self.router}")
        if self.router != "centroid":
            _require(self.centroids is None, f"centroids work with router centroid, not {self.router}")
        if self.scope == "shared" and "token" in self.router_input:
            raise ValueError(
                f"scope shared decides before the first block, so its router cannot look at router_input "
                f"{self.router_input}; add --moe.router-input plain, label+position or time+label"
            )

    def _check_select(self) -> None:
        at_least(self, 0, "jitter")
        seen, by_place = self.router_input.split("+"), self.router_input == "position"
        _require(self.jitter < 1, f"jitter is {self.jitter}; it must lie in [0, 1)")
        limited, unseen = self.overflow != "none", "needs a router that sees images, and router_input position does not"
        _require(not (self.jitter and by_place), f"jitter {unseen}")
        _require(not (self.overflow == "random" and by_place), f"overflow random {unseen}")
        if (self.select == "expert_choice" or limited) and not {"token", "plain", "position"} & {*seen}:
            what = "select expert_choice" if self.select == "expert_choice" else f"overflow {self.overflow}"
            raise ValueError(
                f"{what} compares the tokens of an image, which with router_input {self.router_input} share a decision"
            )
        start = self.capacity_start
        if start is not None:
            _require(0 < start <= MOST, f"capacity_start is {start}; it must be above 0, and finite")
            needed = self.select == "expert_choice" or limited
            _require(needed, "capacity_start works with select expert_choice, or with overflow order or random")
        _require(
            not self.shared_gate or self.shared_width > 0, "shared_gate needs a shared expert, and shared_width is 0"
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network is trained to predict."""

    prediction_type: PredictionType = "v_prediction"
    """Noise, velocity v, the clean image, or flow matching's velocity eps - x_0."""
    learn_sigma: bool = False
    """Also learn the reverse variance (improved DDPM's hybrid loss); for epsilon only."""
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule of the diffusion objectives (diffusers' names)."""
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Law of the training times; logit_normal (SD3) is for flow_prediction."""
    class_dropout_prob: float = 0.1
    """Share of training samples whose label is replaced by the null label, for guidance."""

    def __post_init__(self) -> None:
        kind, share = self.prediction_type, self.class_dropout_prob
        flow = kind == "flow_prediction"
        _require(0 <= share <= 1, f"class_dropout_prob is {share}; it must lie in [0, 1]")
        if self.learn_sigma and kind != "epsilon":
            raise ValueError(f"learn_sigma works with prediction_type epsilon, not {kind}")
        if self.time_sampling != "uniform" and not flow:
            raise ValueError(f"time_sampling logit_normal works with flow_prediction, not {kind}")
        if self.beta_schedule != "linear" and flow:
            raise ValueError(f"beta_schedule {self.beta_schedule} does not apply to {kind}, which has no betas")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from."""

    name: Literal["digits", "fashion", "folder", "latents"] = "digits"
    """digits (bundled), fashion (Fashion-MNIST), folder (one sub-folder a class), latents (safetensors shards, made by
    python -m ditmoe encode)."""
    path: Path | None = None
    """Folder of the images, of the IDX files, or of the latent shards."""
    vae: Path | None = None
    """latents: folder of the VAE that made them, saved with the model so that it draws pictures."""
    download: bool = False
    """Let torchvision download Fashion-MNIST into ./data when it is nowhere else."""
    fit: Literal["exact", "crop"] = "exact"
    """Images (not latents) must have sample_size and in_channels exactly, or are resized, centre-cropped and converted:
    halved while twice too large, then bicubic, as in ADM."""
    flip: bool = False
    """Mirror images left-right at random; of latents, take those of the mirrored images."""
    num_workers: int = 0
    """Processes that read images; 0 reads in the training process."""
    max_bad: int = 0
    """folder: files that cannot be used and are skipped, each named, before the run stops."""
    mixture: tuple[str, ...] = ()
    """Several sets in one run, instead of `name`: SET or SET=WEIGHT each, where SET is digits, fashion or a folder of
    images, and samples are of a set in proportion to its weight (1 if not given). The number of a set, from 0, is its
    domain; classes are put side by side."""
    alternate: bool = False
    """mixture: each optimiser step is of one set, in turn (IMP); otherwise every step has samples of all."""

    def __post_init__(self) -> None:
        at_least(self, 0, "num_workers", "max_bad")
        self._check_mixture()
        names = [part.name for part, _ in self.sets()] if self.mixture else [self.name]
        name = " and ".join(dict.fromkeys(names))
        _require(not self.max_bad or "folder" in names, f"max_bad works with folder, not {name}")
        _require(not self.download or "fashion" in names, f"download works with the data set fashion, not {name}")
        _require(self.path is None or name != "digits", "path does not apply to digits, which are bundled")
        _require(self.fit == "exact" or name != "latents", "fit crop works with images, not latents")
        _require(self.vae is None or name == "latents", f"vae works with latents, not {name}")

    def sets(self) -> list[tuple[DataConfig, int]]:
        """The sets of the run, a configuration of each alone, with whole numbers in proportion to their weights."""
        entries = [_weighted(entry) for entry in self.mixture]
        whole = math.lcm(*(weight.denominator for _, weight in entries))
        return [(self._alone(word), int(weight * whole)) for word, weight in entries] or [(self, 1)]

    def _alone(self, word: str) -> DataConfig:
        named = word in ("digits", "fashion")
        kind: Any = word if named else "folder"
        path, bad, download = None if named else Path(word), 0 if named else self.max_bad, self.download
        return replace(
            self,
            mixture=(),
            alternate=False,
            name=kind,
            path=path,
            max_bad=bad,
            download=download and kind == "fashion",
        )

    def _check_mixture(self) -> None:
        entries = [_weighted(entry) for entry in self.mixture]
        places = [Path(word) for word, _ in entries]
        again = next((place for n, place in enumerate(places) if place in places[:n]), None)
        _require(again is None, f"mixture has {again} twice; give it a weight, as in {again}=2")
        _require(len(places) != 1, f"mixture has one set, {', '.join(self.mixture)}; add another, or give --data.name")
        _require(not places or self.path is None, "path does not apply to a mixture, in which folders are named")
        _require(
            bool(places) or not self.alternate, "alternate needs several sets; give them as --data.mixture SET SET"
        )
        if self.alternate and len({weight for _, weight in entries}) > 1:
            raise ValueError("alternate takes the sets in turn, so it does not go with weights; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimiser, the loop, and what it writes."""

    batch_size: int = 128
    """Images of one optimiser step, over all processes and accumulation."""
    accumulation: int = 1
    """Micro-batches of one optimiser step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon makes the momentum of matrices orthogonal; embeddings, adaLN, routers, the final layer, convolutions, norms
    and biases stay with adamw."""
    muon_on: Literal["trunk", "all"] = "trunk"
    """muon: attention, dense and shared feed-forward layers (trunk), or routed experts too."""
    muon_factor: float = 1.0
    """muon: learning rate of its matrices, times `learning_rate`."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int | None = None
    """Step at which the learning rate reaches zero (linearly, from the peak); None keeps it constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    beta2: float = 0.99
    """Second-moment decay of AdamW (the first is 0.9)."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    ema_decay: float = 0.999
    """Decay of the moving average: min(ema_decay, (1 + n) / (10 + n)) at step n, parameters and buffers."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it fast, else fp32."""
    compile: bool = False
    """Compile the blocks (torch.compile): minutes at the start, faster steps after; the last digits change."""
    log_every: int = 20
    """Steps between metrics rows (1 when max_steps is at most 200)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints to keep, each read back and found whole before an older one goes; 0 keeps all."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written (disk full): train on and try again at the next one, or stop."""
    max_skipped: int = 10
    """Steps in a row that are skipped because a loss, gradient or router logit is not finite, before the run stops."""
    sample_every: int = 0
    """Steps between sample grids and scores during training; 0 makes none."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard (extra: track)."""

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "accumulation", "learning_rate", "muon_factor", "log_every", "checkpoint_every")
        at_least(self, 0, "warmup_steps", "weight_decay", "clip", "keep", "sample_every", "max_skipped")
        _require(self.muon_on == "trunk" or self.optimizer == "muon", "muon_on all needs --train.optimizer muon")
        for name in ("ema_decay", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} is {value}; it must lie in [0, 1)")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps {self.decay_steps} must come after warmup_steps {self.warmup_steps}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How the report draws images; sampler, steps and cfg are also saved with the model as its defaults."""

    sampler: str = "ddim"
    """A name of samplers.SAMPLERS."""
    steps: int = 50
    """Sampling steps."""
    cfg: float = 1.5
    """Classifier-free guidance scale; 1 is no guidance."""
    num: int = 500
    """Images that the report makes, judges and scores."""
    batch_size: int = 250
    """Images drawn at once."""

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size")
        _require(self.steps <= 1000, f"steps is {self.steps}; the training schedule has 1000")
        _require(self.num >= 2, f"num is {self.num}; a score needs 2 images or more")
        _require(0 <= self.cfg < math.inf, f"cfg is {self.cfg}; it must be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is split over the processes of a launch. It may change between the parts of a run."""

    experts: int = 1
    """Processes that share the experts of every layer (expert parallelism)."""
    shard: bool = False
    """Cut everything else into slices too, a slice a process (FSDP2); otherwise it is replicated (DDP)."""
    gather: Literal["float32", "bfloat16"] = "float32"
    """What --parallel.shard gathers of the float32 slices; gradients are summed in float32, routers never rounded."""

    def __post_init__(self) -> None:
        _positive(self, "experts")
        if self.gather != "float32" and not self.shard:
            raise ValueError("gather bfloat16 needs --parallel.shard: else nothing is gathered")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The devices that --dry-run plans for; nothing that trains reads it."""

    devices: int = 0
    """Devices, one process each; 0 prints no plan."""
    memory: float = 80.0
    """Memory of a device, in GB (10^9 bytes)."""
    tflops: float = 989.0
    """Peak arithmetic of a device, in 10^12 operations a second (H100 SXM, dense bf16: 989)."""
    efficiency: float = 0.4
    """Share of that peak that a training step reaches, in (0, 1]."""
    bandwidth: float = 50.0
    """What a device sends, in GB (10^9 bytes) a second (InfiniBand NDR: 50)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "devices")
        _positive(self, "memory", "tflops", "bandwidth")
        _require(0 < self.efficiency <= 1, f"efficiency is {self.efficiency}; it must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    out: Path = Path("runs/digits")
    """The run folder."""
    max_steps: int = 3000
    """Optimiser steps in all."""
    seed: int = 0
    """Of weights, data order, noise, times, dropped labels and sampled images."""
    dry_run: bool = False
    """Check and print the configuration and parameter counts, then stop."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        _positive(self, "max_steps")
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must lie in [0, 2^63)")
        split, decay = self.parallel.experts, self.train.decay_steps
        if split > 1 and self.moe.blocks == "none":
            raise ValueError(f"parallel.experts {split} does not apply to a model without experts (moe.blocks none)")
        if self.train.muon_on == "all" and self.moe.blocks == "none":
            raise ValueError("train.muon_on all does not apply to a model without experts (moe.blocks none)")
        if self.train.optimizer == "muon" and self.parallel.shard:
            raise ValueError(
                "train.optimizer muon needs whole matrices, which parallel.shard cuts; leave one of them out"
            )
        self._check_domains()
        if decay is not None and self.max_steps > decay:
            raise ValueError(
                f"max_steps {self.max_steps} is beyond train.decay_steps {decay}, where the learning rate is 0; "
                f"a longer run is another run: give --train.decay-steps too, and another --out"
            )

    def _check_domains(self) -> None:
        weight, domains, experts = self.moe.domain_weight, len(self.data.mixture), self.moe.num_experts
        if not weight:
            return
        if self.moe.blocks == "none":
            raise ValueError("moe.domain_weight does not apply to a model without experts (moe.blocks none)")
        if not domains:
            raise ValueError(f"moe.domain_weight {weight} needs several data sets; give them as --data.mixture SET SET")
        if experts < domains:
            raise ValueError(
                f"moe.num_experts {experts} cannot be shared among {domains} data sets, as moe.domain_weight asks for; "
                f"set --moe.num-experts {domains} or more"
            )


def _weighted(entry: str) -> tuple[str, Fraction]:
    """SET or SET=WEIGHT of a mixture. ValueError where the weight is none."""
    word, equals, text = entry.rpartition("=")
    if not equals:
        word, text = entry, "1"
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not word or not 1 / MOST <= weight <= MOST:
        raise ValueError(
            f"mixture has {entry!r}; give SET or SET=WEIGHT with a weight above 0, such as {word or 'SET'}=2"
        )
    return word, Fraction(str(weight))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(0 < value <= MOST, f"{name} is {value}; it must be above 0, and finite")


def at_least(section: object, least: int, *names: str) -> None:
    """ValueError where one of these values of a section is below the least; None is no value."""
    for name in names:
        value = getattr(section, name)
        _require(value is None or value >= least, f"{name} is {value}; it must be {least} or more")
        _require(value is None or value <= MOST, f"{name} is {value}; it must be finite")


def has_experts(blocks: str, index: int) -> bool:
    """Whether block `index` (from 0) holds experts where `moe.blocks` is `blocks`."""
    return blocks == "all" or (blocks == "every-second" and index % 2 == 1)


def micro_batch_size(train: TrainConfig, num_processes: int) -> int:
    """Images of one forward pass of one process. ValueError when batch_size does not divide."""
    parts = train.accumulation * num_processes
    if train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} is not a multiple of accumulation {train.accumulation} * "
            f"{num_processes} processes; {-(-train.batch_size // parts) * parts} is"
        )
    return train.batch_size // parts

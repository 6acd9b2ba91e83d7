"""What a run is: frozen dataclasses and their checks. Imports no torch.

A run's `config.json` is this tree. Every value is in the unit its docstring names; "steps" are optimiser steps and
batch sizes are global (over all processes and accumulation).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .checks import at_least, positive, require
from .data import DataConfig as DataConfig
from .devices import ParallelConfig as ParallelConfig
from .devices import PlanConfig as PlanConfig
from .distill import DistillConfig as DistillConfig
from .experts import MoEConfig as MoEConfig

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
    head_width: int | None = None
    """Channels d of a head; None: hidden_size / num_heads."""
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
    local_conv: bool = False
    """Begin every block with a 3x3 depthwise convolution over the grid of tokens, which is added to them."""
    long_skips: bool = False
    """Give every block of the second half also what its mirror image of the first half began with."""
    head_experts: int = 0
    """Linear heads that end the network, weighed by a gate that sees time and label; 0 or 1: the one of DiT."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        positive(self, "sample_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "ffn_width")
        at_least(self, 0, "refine_width", "head_experts")
        require(self.depth > 1 or not self.long_skips, "long_skips joins blocks, and depth is 1; leave it out")
        size, patch, classes = self.sample_size, self.patch_size, self.num_classes
        require(classes is None or classes >= 0, f"num_classes is {classes}; it must be 0 (unconditional) or more")
        require(size % patch == 0, f"sample_size {size} is not a multiple of patch_size {patch}")
        unit, value, own = 4 * self.num_heads, self.hidden_size, self.head_width
        what = f"hidden_size {value} must be a multiple of 4 * num_heads = {unit}"
        if own is not None:
            what = f"head_width {own} and hidden_size {value} must be multiples of 4"
            unit, value = 4, own if value % 4 == 0 else 0
        require(value % unit == 0 < value, f"{what}, so that a head splits into two rotary halves for two axes")

    @property
    def attention_width(self) -> int:
        """Channels of all heads together."""
        return self.hidden_size if self.head_width is None else self.num_heads * self.head_width


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
    """Law of the training times; logit_normal (SD3) is for flow_prediction. Few calls have those of their steps."""
    class_dropout_prob: float = 0.1
    """Share of training samples whose label is replaced by the null label, for guidance."""
    expert_weight: float = 0.0
    """model.head_experts: weight of each head's own squared error, by its gate (expert loss integration)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "expert_weight")
        kind, share = self.prediction_type, self.class_dropout_prob
        flow = kind == "flow_prediction"
        require(0 <= share <= 1, f"class_dropout_prob is {share}; it must lie in [0, 1]")
        eps = kind == "epsilon"
        require(eps or not self.learn_sigma, f"learn_sigma works with prediction_type epsilon, not {kind}")
        if self.time_sampling != "uniform" and not flow:
            raise ValueError(f"time_sampling logit_normal works with flow_prediction, not {kind}")
        if self.beta_schedule != "linear" and flow:
            raise ValueError(f"beta_schedule {self.beta_schedule} does not apply to {kind}, which has no betas")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimiser, the loop, and what it writes."""

    init: Path | None = None
    """Begin with the weights of this model folder or run, which must be of the same network as is asked for; None:
    new ones. They are read before the first step alone: a run is resumed without them."""
    batch_size: int = 128
    """Images of one optimiser step, over all processes and accumulation."""
    accumulation: int = 1
    """Micro-batches of one optimiser step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon makes the momentum of matrices orthogonal; embeddings, adaLN, routers, the final layer, convolutions, norms
    and biases stay with adamw."""
    muon_on: Literal["trunk", "all"] = "trunk"
    """muon: attention, long skips, dense and shared feed-forward layers (trunk), or routed experts too."""
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
    """Compile the blocks (which: docs/scale.md): minutes at the start, faster steps after; the last digits change."""
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
    moved: bool = False
    """A run goes on on other hardware: its learning_rate, precision and accumulation may change, which is said and
    noted in command.txt."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Whom to send metrics and sample grids to, beside metrics.jsonl; its package has to be installed (tensorboard
    comes with the extra track). WANDB_MODE=offline and the like are read as ever."""

    def __post_init__(self) -> None:
        positive(self, "batch_size", "accumulation", "learning_rate", "muon_factor", "log_every", "checkpoint_every")
        at_least(self, 0, "warmup_steps", "weight_decay", "clip", "keep", "sample_every", "max_skipped")
        require(self.muon_on == "trunk" or self.optimizer == "muon", "muon_on all needs --train.optimizer muon")
        for name in ("ema_decay", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}; it must lie in [0, 1)")
        whole = self.batch_size % self.accumulation == 0
        require(whole, f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        late = self.decay_steps is not None and self.decay_steps <= self.warmup_steps
        require(not late, f"decay_steps {self.decay_steps} must come after warmup_steps {self.warmup_steps}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How the report draws images; all up to guidance_interval is also saved with the model as its defaults."""

    sampler: str = "ddim"
    """A name of samplers.SAMPLERS."""
    steps: int = 50
    """Sampling steps."""
    cfg: float = 1.5
    """Classifier-free guidance scale; 1 is no guidance."""
    flow_shift: float | None = None
    """flow-*, dpm++2m, unipc: steps evenly spread over the flow's time, warped towards noise by this."""
    guidance_interval: tuple[float, float] | None = None
    """Guide between these two timesteps alone (lowest, highest, of 0..1000); None: at all."""
    num: int = 500
    """Images that the report makes, judges and scores."""
    batch_size: int = 250
    """Images drawn at once."""

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_size")
        require(self.steps <= 1000, f"steps is {self.steps}; the training schedule has 1000")
        require(self.num >= 2, f"num is {self.num}; a score needs 2 images or more")
        require(0 <= self.cfg < math.inf, f"cfg is {self.cfg}; it must be 0 or more, and finite")
        shift = self.flow_shift
        require(shift is None or 0 < shift < math.inf, f"flow_shift is {shift}; it must be above 0, and finite")
        span = self.guidance_interval
        if span is not None and not 0 <= span[0] < span[1] <= 1000:
            raise ValueError(f"guidance_interval is {span}; it must be (lowest, highest) timestep within 0..1000")


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
    distill: DistillConfig = field(default_factory=DistillConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        positive(self, "max_steps")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must lie in [0, 2^63)")
        split, decay = self.parallel.experts, self.train.decay_steps
        none, of_none = self.moe.blocks == "none", "does not apply to a model without experts (moe.blocks none)"
        muon, factorised = self.train.muon_on == "all", self.moe.experts == "factorised" and not none
        require(split == 1 or not none, f"parallel.experts {split} {of_none}")
        require(not (muon and none), f"train.muon_on all {of_none}")
        one_piece = "does not apply to moe.experts factorised, which are one piece"
        require(split == 1 or not factorised, f"parallel.experts {split} {one_piece}")
        stacked = "train.muon_on all is for stacked experts, and moe.experts is factorised; leave it out"
        require(not (muon and factorised), stacked)
        whole = "train.optimizer muon needs whole matrices, which parallel.shard cuts; leave one of them out"
        require(self.train.optimizer != "muon" or not self.parallel.shard, whole)
        weight, heads = self.objective.expert_weight, self.model.head_experts
        several = f"objective.expert_weight {weight} is of several heads, and model.head_experts is {heads}"
        require(not weight or heads > 1, f"{several}; add --model.head-experts 4")
        closed = "moe.hoyer_weight looks into layers, which train.compile closes; leave one of them out"
        require(not (self.moe.hoyer_weight and self.train.compile), closed)
        self.distill.check(self)
        self._check_domains()
        self._check_resolutions()
        beyond = f"max_steps {self.max_steps} is beyond train.decay_steps {decay}, where the learning rate is 0"
        longer = "a longer run is another run: give --train.decay-steps too, and another --out"
        require(decay is None or self.max_steps <= decay, f"{beyond}; {longer}")

    def other_sizes(self) -> list[int]:
        """Sizes of images beside model.sample_size that the run is of."""
        return sorted({size for size in self.data.resolutions() if size} - {self.model.sample_size})

    def _check_resolutions(self) -> None:
        patch, others = self.model.patch_size, self.other_sizes()
        for size in others:
            require(size % patch == 0, f"data.mixture has size {size}, no multiple of model.patch_size {patch}")
        seen = self.moe.router_input if others and self.moe.blocks != "none" else ""
        one = f"moe.router_input {seen} knows the places of one size, and data.mixture has others"
        require("position" not in seen, f"{one}; add --moe.router-input token")

    def _check_domains(self) -> None:
        weight, domains, experts = self.moe.domain_weight, len(self.data.mixture), self.moe.num_experts
        if not weight:
            return
        none = "moe.domain_weight does not apply to a model without experts (moe.blocks none)"
        require(self.moe.blocks != "none", none)
        require(domains > 0, f"moe.domain_weight {weight} needs several data sets; give them as --data.mixture SET SET")
        few = f"moe.num_experts {experts} cannot be shared among {domains} data sets, as moe.domain_weight asks for"
        require(experts >= domains, f"{few}; set --moe.num-experts {domains} or more")


def looks_ahead(config: Config) -> bool:
    """Whether a step passes over its micro-batches once more, before: losses of loads need those of all of them.

    Where places alone decide they are the same in all.
    """
    moe = config.moe
    by_load = moe.balance_weight + moe.contrastive_weight > 0 and moe.router_input != "position"
    return config.train.accumulation > 1 and moe.blocks != "none" and by_load


def micro_batch_size(train: TrainConfig, num_processes: int) -> int:
    """Images of one forward pass of one process. ValueError when batch_size does not divide."""
    parts = train.accumulation * num_processes
    if train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} is not a multiple of accumulation {train.accumulation} * "
            f"{num_processes} processes; {-(-train.batch_size // parts) * parts} is"
        )
    return train.batch_size // parts

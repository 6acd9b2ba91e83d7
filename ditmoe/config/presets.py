"""The presets: whole configurations by name. The paper's models, ours, and small ones that train on a laptop."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from .sections import Config, DataConfig, ModelConfig, MoEConfig, ObjectiveConfig, SampleConfig, TrainConfig

_FLOW = ObjectiveConfig(prediction_type="flow_prediction", time_sampling="logit_normal")
_SMALL = TrainConfig(batch_size=64, optimizer="muon", learning_rate=4e-3, precision="fp32")  # on a CPU


def _paper(depth: int, width: int, heads: int, experts: int, qk_norm: Literal["none", "layer"]) -> Config:
    """A model of DiT-MoE's Table 1: every block has experts of hidden width 4D and one shared of 2D."""
    return Config(
        max_steps=7_000_000,
        model=ModelConfig(
            sample_size=32, in_channels=4, num_classes=1000, patch_size=2, hidden_size=width, depth=depth,
            num_heads=heads, ffn_width=4 * width, positions="sincos", qk_norm=qk_norm,
        ),
        moe=MoEConfig(
            blocks="all", num_experts=experts, top_k=2, expert_width=4 * width, shared_width=2 * width,
            score="softmax", renormalize=False, balance_weight=0.005,
        ),
        objective=ObjectiveConfig(prediction_type="epsilon", learn_sigma=True),
        data=DataConfig(name="latents", flip=False, num_workers=4),
        train=TrainConfig(
            batch_size=1024, learning_rate=1e-4, warmup_steps=0, beta2=0.999, clip=0.0, ema_decay=0.9999,
            log_every=100, checkpoint_every=50_000,
        ),
        sample=SampleConfig(sampler="ddpm", steps=250, cfg=1.5),
    )  # fmt: skip


def _ours(depth: int, width: int, heads: int, experts: int, top_k: int, expert_width: int, ffn: int) -> Config:
    """A model with the activated parameters of the dense DiT of the same letter, in the shape that pays."""
    return Config(
        max_steps=400_000,
        model=ModelConfig(
            sample_size=32, in_channels=4, num_classes=1000, patch_size=2, hidden_size=width, depth=depth,
            num_heads=heads, ffn_width=ffn,
        ),
        moe=MoEConfig(
            blocks="every-second", num_experts=experts, top_k=top_k, expert_width=expert_width,
            shared_width=expert_width, bias_rate=0.001, balance_weight=0.0001,
        ),
        objective=_FLOW,
        data=DataConfig(name="latents", num_workers=4),
        train=TrainConfig(
            batch_size=256, learning_rate=1e-4, warmup_steps=1000, beta2=0.95, ema_decay=0.9999,
            log_every=100, checkpoint_every=10_000,
        ),
        sample=SampleConfig(sampler="flow-euler", steps=50, cfg=1.5),
    )  # fmt: skip


PRESETS: dict[str, Config] = {
    "digits": Config(
        max_steps=1400,
        model=ModelConfig(sample_size=8, patch_size=2, hidden_size=96, depth=4, ffn_width=256, refine_width=32),
        moe=MoEConfig(num_experts=8, top_k=2, expert_width=80, shared_width=96),
        objective=_FLOW,
        train=replace(_SMALL, decay_steps=1400),
        sample=SampleConfig(sampler="dpm++2m", steps=20, cfg=1.25, num=1000),
    ),
    "fashion": Config(
        max_steps=5000,
        model=ModelConfig(
            sample_size=28,
            patch_size=4,
            hidden_size=128,
            depth=6,
            ffn_width=384,
            positions="sincos",
            refine_width=64,
            local_conv=True,
            long_skips=True,
        ),
        moe=MoEConfig(num_experts=16, expert_width=128, shared_width=128, router_input="position"),
        objective=_FLOW,
        data=DataConfig(name="fashion"),
        train=replace(
            _SMALL,
            learning_rate=8e-3,
            muon_factor=2.0,
            clip=0.5,
            warmup_steps=200,
            decay_steps=5000,
            checkpoint_every=625,
            precision="auto",
        ),
        sample=SampleConfig(sampler="unipc", steps=10, cfg=1.5, flow_shift=1.7, guidance_interval=(0.0, 800.0)),
    ),
    "folder": Config(
        max_steps=20_000,
        model=ModelConfig(sample_size=32, in_channels=3, patch_size=2, hidden_size=256, depth=8, ffn_width=768),
        moe=MoEConfig(num_experts=16, expert_width=256, shared_width=256),
        data=DataConfig(name="folder", flip=True, num_workers=2),
        train=TrainConfig(learning_rate=5e-4, decay_steps=20_000),
    ),
    "s": _ours(12, 384, 6, 16, 3, 256, 1024),
    "b": _ours(12, 768, 12, 48, 7, 256, 2048),
    "l": _ours(24, 1024, 16, 48, 7, 344, 2752),
    "xl": _ours(28, 1152, 16, 48, 7, 384, 3072),
    "dit-moe-s/2-8e2a": _paper(12, 384, 6, 8, "none"),
    "dit-moe-s/2-16e2a": _paper(12, 384, 6, 16, "none"),
    "dit-moe-b/2-8e2a": _paper(12, 768, 12, 8, "none"),
    "dit-moe-l/2-8e2a": _paper(24, 1024, 16, 8, "none"),
    "dit-moe-xl/2-8e2a": _paper(28, 1152, 16, 8, "layer"),
    "dit-moe-g/2-16e2a": _paper(40, 1408, 16, 16, "layer"),
}
PRESETS |= {
    f"imagenet-256-{size}": replace(PRESETS[size], data=replace(PRESETS[size].data, flip=True))
    for size in ("s", "b", "l", "xl")
}
PRESETS = {name: replace(config, out=Path("runs") / name.replace("/", "-")) for name, config in PRESETS.items()}

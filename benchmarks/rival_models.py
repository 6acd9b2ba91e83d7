"""Diffusers' class-conditional networks, of a size that is asked for, called as ours are.

Shapes: N images, C channels, H W size; labels y int64 (N,), of which `num_classes` is the null label.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ditmoe.config.sections import ModelConfig

OPTIONS = {"unet": ("plain", "channels last"), "dit": ("fused attention", "plain attention")}  # how it may run faster


class Rival(nn.Module):
    """A diffusers network that `training.step.optimise` trains and `samplers.sample` asks: t (N,) is on 0..1000."""

    net: Any

    def __init__(self, net: nn.Module, num_classes: int, prediction_type: str) -> None:
        super().__init__()
        self.net, self.null_label = net, num_classes
        self.config = SimpleNamespace(prediction_type=prediction_type)

    def ask(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction (N, C, H, W)."""
        answer: Tensor = self.net(x, t, class_labels=y).sample
        return answer

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        """The prediction (N, C, H, W), as `.sample` or in the tuple (sample, no routing records)."""
        sample = self.ask(x, t, class_labels)
        return SimpleNamespace(sample=sample) if return_dict else (sample, [])


class _Given(nn.Module):
    """Stands where a block has an embedder of its own, and gives what was embedded once for all blocks."""

    value: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor:
        assert self.value is not None
        return self.value


class RivalDiT(Rival):
    """Diffusers' DiT as DiT (arXiv 2212.09748) is: one embedder of time and label, and adaLN-Zero's initial weights.

    Diffusers has one embedder a block, a quarter of the parameters of a small model, each of which drops labels by
    itself in training; and it leaves PyTorch's initial weights where a checkpoint is to be loaded.
    """

    def __init__(self, net: Any, num_classes: int, prediction_type: str) -> None:
        super().__init__(net, num_classes, prediction_type)
        self.embed, self.given = net.transformer_blocks[0].norm1.emb, _Given()
        self.embed.class_embedder.dropout_prob = 0.0  # labels are dropped by the objective, the same for everyone
        for block in net.transformer_blocks:
            block.norm1.emb = self.given
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.net.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))
        nn.init.zeros_(patches.bias)
        times = self.embed.timestep_embedder
        for weight in (times.linear_1.weight, times.linear_2.weight, self.embed.class_embedder.embedding_table.weight):
            nn.init.normal_(weight, std=0.02)
        gates = [block.norm1.linear for block in self.net.transformer_blocks]
        for layer in (*gates, self.net.proj_out_1, self.net.proj_out_2):
            nn.init.zeros_(layer.weight)

    def ask(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction (N, C, H, W)."""
        self.given.value = self.embed(t, y, hidden_dtype=x.dtype)
        try:
            return super().ask(x, t, y)
        finally:
            self.given.value = None


class Sized(NamedTuple):
    """A network that can be made: how, its parameters, and its shape in words."""

    make: Callable[[], Rival]
    parameters: int
    shape: str


@cache
def sized(kind: str, target: int, model: ModelConfig, num_classes: int, prediction_type: str) -> Sized:
    """The "unet" or "dit" of the number of parameters nearest to the target, for a preset's images."""
    make = partial(_unet if kind == "unet" else _dit, model, num_classes, prediction_type)
    shapes = _unet_shapes(target) if kind == "unet" else _dit_shapes(model, target)
    found = [(_count(partial(make, *shape)), shape) for shape in shapes]
    parameters, shape = min(found, key=lambda each: abs(each[0] - target))
    if kind == "unet":
        channels = ", ".join(map(str, shape[: _levels(model.sample_size)]))
        words = f"channels {channels}, 2 layers a level, attention below the first"
    else:
        words = (
            f"width {shape[1] * model.num_heads}, {model.num_heads} heads, depth {shape[0]}, patch {model.patch_size}"
        )
    return Sized(partial(make, *shape), parameters, words)


def run_as(rival: Rival, option: str) -> Rival:
    """The same network the way that an option of `OPTIONS` names."""
    if option == "channels last":
        return rival.to(memory_format=torch.channels_last)
    for module in rival.modules() if option == "plain attention" else ():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    return rival


def _count(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def _levels(side: int) -> int:
    """Resolutions of the UNet: at most three, each half of the one before."""
    return 3 if side % 4 == 0 else 2 if side % 2 == 0 else 1


def _unet_shapes(target: int) -> Iterable[tuple[int, ...]]:
    about = 32 * (target / 1.8e6) ** 0.5  # channels 32, 64, 64 have 1.8 M
    firsts = range(max(8, int(0.6 * about) // 8 * 8), int(1.4 * about) + 9, 8)
    all_ = [(a, b, c) for a in firsts for b in range(a, 5 * a // 2 + 1, 8) for c in (b, b + 8, b + 16)]
    return [(a, b, c) for a, b, c in all_ if 0.8 < (a + b + c) / (5 * about) < 1.25]


def _unet(model: ModelConfig, num_classes: int, prediction_type: str, *channels: int) -> Rival:
    """With scale and shift after the norms (ADM, arXiv 2105.05233): a norm of narrow groups takes away what is added
    before it, so that diffusers' default hardly hears time and label in a small network.
    """
    levels = _levels(model.sample_size)
    kinds = ["", "Attn", "Attn"][:levels]
    net = UNet2DModel(
        sample_size=model.sample_size, in_channels=model.in_channels, out_channels=model.in_channels,
        block_out_channels=channels[:levels], layers_per_block=2, num_class_embeds=num_classes + 1,
        norm_num_groups=8, attn_norm_num_groups=8, resnet_time_scale_shift="scale_shift",
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    )  # fmt: skip
    return Rival(net, num_classes, prediction_type)


def _dit_shapes(model: ModelConfig, target: int) -> Iterable[tuple[int, ...]]:
    about = (target / (18 * model.depth)) ** 0.5 / model.num_heads  # 12 D^2 and adaLN's 6 D^2 a block
    sizes = range(max(2, int(0.7 * about) // 2 * 2), int(1.3 * about) + 3, 2)
    return [(depth, size) for depth in (model.depth, model.depth - 1, model.depth + 1) if depth for size in sizes]


def _dit(model: ModelConfig, num_classes: int, prediction_type: str, depth: int, size: int) -> Rival:
    net = DiTTransformer2DModel(
        num_attention_heads=model.num_heads, attention_head_dim=size, in_channels=model.in_channels, num_layers=depth,
        sample_size=model.sample_size, patch_size=model.patch_size, num_embeds_ada_norm=num_classes,
    )  # fmt: skip
    return RivalDiT(net, num_classes, prediction_type)

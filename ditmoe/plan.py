"""What a run would need on many devices: memory, arithmetic and traffic, calculated and not run. Needs no torch.

One process a GPU, float32 parameters, `train.precision` bf16 (autocast; "auto" counts as bf16) or fp32.

Shapes: T tokens of an image, D width, E experts, K experts per token, F hidden width, S tokens of a micro-batch, n
devices, d of them share a layer's experts; m is 2 for swiglu, 1 for gelu; b is 2 bytes in bf16, 4 in fp32.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Literal, NamedTuple

from .config import Config

if TYPE_CHECKING:
    from .model import DiTMoETransformer2DModel

Way = Literal["DDP", "FSDP2", "experts"]  # FSDP2 on two devices or more
USABLE = 0.9  # of a device's memory; the rest is for the driver, the communication library and fragments
_ROWS = (
    "a device, in GB", "gradient checkpointing", "weights", "gradients", "optimiser", "moving average", "buffers",
    "activations", "peak", "fits", "largest micro-batch", "sent a step: all-reduce", "  all-gather, reduce-scatter",
    "  all-to-all", "seconds a step, arithmetic", "  sending, nothing hidden",
)  # fmt: skip


class Flops(NamedTuple):
    """Floating-point operations of one image in one forward pass (a multiply-add is two): whole, in the blocks."""

    forward: float
    blocks: float

    def training(self, checkpointing: bool) -> float:
        """Forward and backward, where each product has two; checkpointing repeats the blocks."""
        return 3 * self.forward + (self.blocks if checkpointing else 0.0)


class Block(NamedTuple):
    """Parameters of one block outside and inside its routed experts, and bytes of one image (see `_activations`)."""

    own: float
    experts: float
    saved: float
    boundary: float
    passing: float


class Needs(NamedTuple):
    """What one device needs, in bytes.

    Attributes:
        weights, gradients, optimizer, average: 4, 4, 8 (AdamW) and 4 for each parameter that the device holds.
        buffers: Copies of weights and gradients, for communication and for products in bf16.
        activations: Of one micro-batch, at their most.
        peak: Largest sum at any time: gradients grow while activations shrink.
        all_reduce, gather_scatter, all_to_all: What it sends in one optimiser step.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    buffers: float
    activations: float
    peak: float
    all_reduce: float
    gather_scatter: float
    all_to_all: float


def flops(config: Config) -> Flops:
    """Matrix products of one image: a token's weights twice, and attention.

    A block: 12 D^2 for adaLN, 8 T D^2 for qkv and projection, 4 T^2 D for attention, 2 (1 + m) T D w for feed-forward
    layers of width w (K F + shared in an MoE layer), 2 T D E for the router. Source: as torch.utils.flop_counter.
    """
    m, e, (T, _, both) = config.model, config.moe, _sizes(config)
    D, pixels = m.hidden_size, T * m.in_channels * m.patch_size**2
    blocks = 0
    for routed in _routed(config):
        width = e.top_k * e.expert_width + e.shared_width if routed else m.ffn_width
        router = e.num_experts if routed and e.router_input == "token" else 0  # by place: once for all images
        blocks += 12 * D**2 + 8 * T * D**2 + 4 * T**2 * D + 2 * T * D * (both * width + router)
    ends = 2 * D * (pixels + 256 + D) + 2 * D * (2 * D + pixels * (2 if config.objective.learn_sigma else 1))
    return Flops(blocks + ends, blocks)


def _sizes(config: Config) -> tuple[int, int, int]:
    """T, b and 1 + m."""
    m, b = config.model, 4 if config.train.precision == "fp32" else 2
    return (m.sample_size // m.patch_size) ** 2, b, 3 if m.activation == "swiglu" else 2


def _routed(config: Config) -> list[bool]:
    """Of every block, whether it holds experts."""
    rule = config.moe.blocks
    return [rule == "all" or (rule == "every-second" and i % 2 == 1) for i in range(config.model.depth)]


def _activations(config: Config, routed: bool) -> tuple[float, float, float]:
    """Bytes of one image in one block: saved for the backward pass; kept by checkpointing; passing in it, at most.

    Saved, a token:
    * 2 (8 D + 8) + b D: both norms in float32, the input of qkv; b D for that of a dense layer; for experts 4 D (the
      router's) and b D (the shared expert's), in fp32 one and the same.
    * 6 b D + 4 heads: qkv, attention and its statistics, its projection, and what the second gate multiplies.
    * 2 b D for q and k that were normalised or turned; where normalised b D more (attention then has another layout),
      and in bf16 their 8 D in float32.
    * b (1 + m) F of a dense layer or the shared expert; of routed experts K b (2 D + (1 + m) F) with grouped
      products, K b (D + m F) in the loop, which gathers and activates again.
    An image: (7 b + 8) D for adaLN. Kept: the block's input, the router's record. Passing: the gradients of the
    residual stream, and of the widest layer.

    Source: what model.py, layers.py and moe/ leave with autograd on a GPU; a test counts it with saved_tensors_hooks.
    Small layers routed by place keep less (`Experts.joined`); the rms norm of fp32 on a CPU keeps 2 b D more.
    """
    m, e, (T, b, both) = config.model, config.moe, _sizes(config)
    half, by_token, D = b == 2, e.router_input == "token", m.hidden_size
    token, record, widest = 2.0 * (8 * D + 8) + 7 * b * D + 4 * m.num_heads, 0.0, both * m.ffn_width
    token += 2 * b * D if m.qk_norm != "none" or m.positions == "rope" else 0
    if m.qk_norm != "none":
        token += b * D + (8 * D if half else 0) + (16 if m.qk_norm == "layer" else 8) * m.num_heads
    if routed:
        K, F = e.top_k, e.expert_width
        loop = e.backend == "loop" or (e.backend == "auto" and bool(D * b % 16 or F * b % 16))
        token += K * b * (D + (both - 1) * F if loop else 2 * D + both * F) + b * both * e.shared_width
        token += (4 * D if by_token or not half else 0) + (b * D if half and e.shared_width else 0)
        record = 8.0 * e.num_experts + 12 * K if by_token else 0.0
        token += record + (36 * K if by_token else 0)
        widest = K * D if loop else K * both * F
    else:
        token += b * D + b * both * m.ffn_width
    return T * token + (7 * b + 8) * D, T * (b * D + record), T * b * (2 * D + max(3 * D, widest))


def blocks(config: Config, model: DiTMoETransformer2DModel) -> list[Block]:
    """Every block; `model` may be on the meta device."""
    found = []
    for block, routed in zip(model.blocks, _routed(config), strict=True):
        experts = sum(p.numel() for name, p in block.named_parameters() if ".experts." in name)
        own = sum(p.numel() for p in block.parameters()) - experts
        found.append(Block(own, experts, *_activations(config, routed)))
    return found


def needs(
    config: Config, parameters: int, parts: list[Block], way: Way, d: int, images: int, checkpointing: bool
) -> Needs:
    """What each of `plan.devices` devices needs for micro-batches of so many images; d is 1 but for "experts".

    DDP holds all parameters; FSDP2 the n-th part; with split experts the d-th part of the experts and all else.

    Buffers: DDP's buckets, 4 B a replicated parameter (Accelerate leaves gradient_as_bucket_view off), and autocast's
    copies, see `_moving`: under FSDP2 of whole weights, as they are gathered. FSDP2: 4 B a parameter of four times the
    largest block (two gathered, one gradient, one being sent) and of what is outside.

    Sent: X (n - 1) / n for an all-gather or reduce-scatter of X bytes, twice that for a ring all-reduce (Patarasuk and
    Yuan, 2009). DDP reduces float32 gradients, those of experts over n / d devices. FSDP2 gathers float32
    parameters twice and scatters their gradients once a micro-batch (`Parallel.shard_rest`). An all-to-all sends
    S K D b (d - 1) / d at even load; two in each direction, two more with checkpointing.
    """
    n, times, (T, b, _) = config.plan.devices, config.train.accumulation, _sizes(config)
    sharded, whole = (True, n) if way == "FSDP2" else (False, 1)
    row = images * T * config.moe.top_k * config.model.hidden_size * b * (d - 1) / d
    local = [
        Block(x.own / whole, x.experts / whole / d, images * x.saved, images * x.boundary, images * x.passing + 2 * row)
        for x in parts
    ]
    outside = (parameters - sum(x.own + x.experts for x in parts)) / whole
    experts, rest = sum(x.experts for x in local), outside + sum(x.own for x in local)
    held, copies = rest + experts, 0 if b == 4 else 2 * whole
    buffers = 0.0 if n == 1 else 4 * (held if d == 1 else rest)
    if sharded:
        buffers = 4 * (4 * max(x.own + x.experts for x in parts) + outside * n)
    kept, most = sum(x.boundary if checkpointing else x.saved for x in local), max(x.saved for x in local)
    return Needs(
        weights=4 * held,
        gradients=4 * held,
        optimizer=8 * held,
        average=4 * held,
        buffers=buffers + copies * held,
        activations=kept + most * checkpointing,
        peak=16 * held + buffers + _moving(local, outside, copies, checkpointing, times > 1),
        all_reduce=0.0 if sharded else 8 * (rest * (n - 1) / n + experts * (n - d) / n),
        gather_scatter=3 * times * 4 * parameters * (n - 1) / n if sharded else 0.0,
        all_to_all=times * (6 if checkpointing else 4) * row * sum(_routed(config)),
    )


def _moving(parts: list[Block], outside: float, copies: int, checkpointing: bool, accumulates: bool) -> float:
    """Most bytes of activations, gradients and autocast's copies (2 B a parameter, 0 without) at any one time.

    Over the blocks from last to first: what the earlier ones and this one keep, what this one recomputes and passes on,
    and the gradients of the later ones (of all, where they accumulate). A copy is kept until used in the backward pass;
    with checkpointing until the end of the forward pass, experts' until the end of their block.
    """
    sizes = [x.own + x.experts for x in parts]
    gradients = 4 * (sum(sizes) + outside)
    kept = [x.boundary if checkpointing else x.saved + copies * size for x, size in zip(parts, sizes, strict=True)]
    rest = copies * (sum(x.own for x in parts) + outside) + max(x.saved + copies * x.experts for x in parts)
    peak = max(gradients, sum(kept) + gradients * accumulates + (rest if checkpointing else 0))  # ends of step, forward
    for i, (x, size) in enumerate(zip(parts, sizes, strict=True)):
        now = x.passing + copies * size + (x.saved + copies * size if checkpointing else 0.0)
        peak = max(peak, sum(kept[: i + 1]) + now + (gradients if accumulates else 4 * sum(sizes[i:])))
    return peak


def table(config: Config, model: DiTMoETransformer2DModel, images: int) -> str:
    """The plan as text, for micro-batches of so many images: a column for each way to use the devices.

    With experts split over d devices, d is the one that sends least of those that fit, or else needs least memory. The
    step's time is its arithmetic alone, at `plan.efficiency`; sending may hide behind it.
    """
    plan, count, E = config.plan, flops(config), config.moe.num_experts
    parameters, parts = sum(p.numel() for p in model.parameters()), blocks(config, model)
    split = [d for d in range(2, E + 1) if plan.devices % d == 0 and E % d == 0 and any(_routed(config))]
    ways: dict[Way, list[int]] = {"DDP": [1], "FSDP2": [1] if plan.devices > 1 else [], "experts": split}

    def column(way: Way, degrees: list[int], checkpointing: bool) -> list[str]:
        def at(d: int, size: int) -> Needs:
            return needs(config, parameters, parts, way, d, size, checkpointing)

        found = {d: at(d, images) for d in degrees}
        fitting = [d for d in degrees if found[d].peak <= usable]
        d = min(fitting or degrees, key=lambda d: sum(found[d][7:]) if fitting else found[d].peak)
        largest = bisect_right(range(1, 2**20), usable, key=lambda size: at(d, size).peak)
        work = config.train.accumulation * images * count.training(checkpointing) / plan.tflops / 1e12
        return [
            f"experts/{d}" if way == "experts" else way,
            "yes" if checkpointing else "no",
            *(f"{size / 1e9:.3f}" for size in found[d][:7]),
            "yes" if fitting else "no",
            f"{largest:,}" if largest else "none",
            *(f"{size / 1e9:.3f}" for size in found[d][7:]),
            f"{work / plan.efficiency:.4f}",
            f"{sum(found[d][7:]) / plan.bandwidth / 1e9:.4f}",
        ]

    usable = USABLE * plan.memory * 1e9
    columns = [column(way, found, again) for way, found in ways.items() if found for again in (False, True)]
    lines = [
        f"plan (a calculation, not a run): {plan.devices} devices of {plan.memory:g} GB, of which {USABLE:.0%} usable; "
        f"micro-batches of {images}, accumulation {config.train.accumulation}, "
        f"{'bf16 autocast' if _sizes(config)[1] == 2 else 'fp32'}",
        f"{count.forward / 1e9:.2f} GFLOP an image forward, {count.training(False) / 1e9:.2f} in training, "
        f"{count.training(True) / 1e9:.2f} with gradient checkpointing",
        *(f"{row[0]:28}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in zip(_ROWS, *columns, strict=True)),
    ]
    return "\n".join(lines)

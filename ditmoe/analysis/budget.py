"""What a run would need on many devices: memory, arithmetic and traffic, calculated and not run.

One process a GPU, float32 parameters, `train.precision` bf16 (autocast; "auto" counts as bf16) or fp32.

Shapes: T tokens of an image, D width, E experts, K experts per token, F hidden width, S tokens of a micro-batch, n
devices, d of them share a layer's experts; m is 2 for swiglu, 1 for gelu; b is 2 bytes in bf16, 4 in fp32.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import pipeline
from ..config.experts import has_experts
from ..config.file import to_dict
from ..config.sections import Config, looks_ahead, micro_batch_size
from ..layers import Refiner
from ..model import DiTMoETransformer2DModel, build, count_parameters
from ..moe.router import MLP_WIDTH
from ..training.muon import matrices
from ..training.muon import work as muon_work
from . import factors

Way = Literal["DDP", "FSDP2"]  # of all but split experts; FSDP2 on two devices or more
USABLE = 0.9  # of a device's memory; the rest is for the driver, the communication library and fragments
_ROWS = (
    "a device, in {}", "parallel.experts", "gradient checkpointing", "weights", "gradients", "optimiser",
    "moving average", "buffers", "activations", "peak", "fits", "largest micro-batch", "sent a step: all-reduce",
    "  all-gather, reduce-scatter", "  all-to-all", "seconds a step, arithmetic", "  sending, nothing hidden",
)  # fmt: skip


class Flops(NamedTuple):
    """Floating-point operations of one image (a multiply-add is two) forward, of which in the blocks, and backward."""

    forward: float
    blocks: float
    backward: float

    def training(self, checkpointing: bool) -> float:
        """Forward and backward; checkpointing repeats the blocks."""
        return self.forward + self.backward + (self.blocks if checkpointing else 0.0)


class Needs(NamedTuple):
    """What one device needs, in bytes; the last three are what it sends in one optimiser step."""

    weights: float  # 4 for each parameter that the device holds
    gradients: float  # 4
    optimizer: float  # 8 (AdamW), of matrices that Muon moves 4
    average: float  # 4
    buffers: float  # copies of weights and gradients, for communication and for products in bf16
    activations: float  # of one micro-batch, at their most
    peak: float  # largest sum at any time: gradients grow while activations shrink
    all_reduce: float
    gather_scatter: float
    all_to_all: float


def flops(config: Config) -> Flops:
    """Matrix products of one image: a token's weights twice, and attention.

    A block: 12 D^2 for adaLN, 8 T D^2 for qkv and projection (with experts of attention 4 T D^2 (1 + K), and 4 T D H E
    for the gates of H heads), 4 T^2 D for attention, 2 (1 + m) T D w for feed-forward layers of width w (K F + shared
    in an MoE layer; factorised experts: see `factors`), 2 T D E for a token that a router sees, 2 D E for a time or
    label (of an mlp 2 h (D + E), h wide), 16 m T K F for biases of experts; for the sums of a prototype router as much
    again. Then the final layer's heads with their gate, and the convolutions that refine. Backward, each product has
    two, sums one where there is a contrastive loss. Source: as torch.utils.flop_counter.
    """
    m, e, (T, _, both) = config.model, config.moe, _sizes(config)
    D, pixels = m.hidden_size, T * m.in_channels * m.patch_size**2
    maps = 4 * T * D * (D * (1 + e.attention_top_k) + m.num_heads * e.attention_experts)
    maps, heads = maps if e.attention_experts else 8 * T * D**2, max(1, m.head_experts)
    blocks, sums, choices, factorised = 0.0, 0, e.num_experts + e.null_experts, e.experts == "factorised"
    router_of = 2 * MLP_WIDTH * (D + choices) if e.router == "mlp" else 2 * D * choices  # a vector that it sees
    active = 0 if factorised else e.rule.active(e.num_experts) * e.expert_width
    for routed in _routed(config):
        width = active + e.shared_width if routed else m.ffn_width
        blocks += factors.operations(config, T, T * _decisions(config)) if routed and factorised else 0
        own = routed and e.scope == "layer"
        tokens, image = _seen(config) if own else (0, 0)  # a router by place: once for all images
        router = router_of * (T * tokens + image)
        sums += router if e.router == "prototype" else 0
        router += 2 * T * D if routed and e.shared_gate else 0
        biased = 16 * T * (both - 1) * active * (routed and e.biases)
        blocks += 12 * D**2 + maps + 4 * T**2 * D + 2 * D * T * both * width + router + biased
    across, refined = _refined(config)
    if e.scope == "shared" and any(_routed(config)):
        tokens, image = _seen(config)
        router = router_of * (T * tokens + image)
        blocks += router
        sums += router if e.router == "prototype" else 0
    ends = 2 * D * (pixels + 256 + D) + 2 * D * (2 * D + heads * T * m.patch_size**2 * across) + refined
    ends += 2 * D * heads if heads > 1 else 0
    return Flops(blocks + sums + ends, blocks + sums, 2 * (blocks + ends) + (sums if e.contrastive_weight else 0))


def _sizes(config: Config) -> tuple[int, int, int]:
    """T, b and 1 + m."""
    m, b = config.model, 4 if config.train.precision == "fp32" else 2
    return (m.sample_size // m.patch_size) ** 2, b, 3 if m.activation == "swiglu" else 2


def _refined(config: Config) -> tuple[int, int]:
    """Channels that tokens draw, and the operations of the convolutions that refine an image: 18 in * out a pixel."""
    m, C = config.model, config.model.in_channels
    out, W = C * (2 if config.objective.learn_sigma else 1), m.refine_width
    drawn = out + Refiner.FEATURES if W else out
    return drawn, 18 * m.sample_size**2 * W * (drawn + C + W + out)


def refinement(config: Config) -> float:
    """Bytes that the convolutions over pixels keep of one image: their input and four of their width a pixel."""
    m, (drawn, _) = config.model, _refined(config)
    kept = drawn + m.in_channels + 4 * m.refine_width if m.refine_width else 0
    return m.sample_size**2 * _sizes(config)[1] * kept


def _routed(config: Config) -> list[bool]:
    """Of every block, whether it holds experts."""
    return [has_experts(config.moe.blocks, i) for i in range(config.model.depth)]


def _seen(config: Config) -> tuple[int, int]:
    """How many inputs a router has of every token, and how many of every image."""
    found = config.moe.router_input.split("+")
    return sum(x in found for x in ("token", "plain")), sum(x in found for x in ("time", "label"))


def _decisions(config: Config) -> float:
    """Decisions a token of an image: 1, or one an image; 0 where those of places are all images'."""
    tokens, image = _seen(config)
    sees = 1.0 if tokens else (1 / _sizes(config)[0] if image else 0.0)
    return 1.0 if sees and "position" in config.moe.router_input else sees


def activations(config: Config, routed: bool, exchanged: bool = False) -> tuple[float, float, float]:
    """Bytes of one image in one block: saved for the backward pass; kept by checkpointing; passing in it, at most.

    Saved, a token:
    * 2 (8 D + 8) + b D: both norms in float32, the input of qkv; b D for that of a dense layer; for experts 4 D (the
      router's, where it is a token's) and b D (the shared expert's), in fp32 one and the same.
    * 6 b D + 4 heads: qkv, attention and its statistics, its projection, and what the second gate multiplies.
    * 2 b D for q and k that were normalised or turned; where normalised b D more (attention then has another layout),
      and in bf16 their 8 D in float32.
    * b (1 + m) F of a dense layer or the shared expert; of routed experts K b (2 D + (1 + m) F) with grouped
      products and of those that are `exchanged`, K b (D + m F) in the loop, which gathers and activates again.
    * 8 E + 48 K of a decision, which belongs to a token or an image; a router by place alone has one for all images.
      Of prototypes 4 E + 12 more, products before they are cosines, and 4 E of a token or image that is seen: who
      serves. Of factorised experts instead of K's: see `factors`.
    * With experts of attention what `_attending` says.
    An image: (7 b + 8) D for adaLN; 4 D + 8 of a time or label that the router sees, in bf16 4 D more of a time. Kept:
    the block's input, the router's record. Passing: the gradients of the residual stream, and of the widest layer.

    Source: what model/, layers.py and moe/ leave with autograd on a GPU; a test counts it with saved_tensors_hooks.
    Small layers routed by place keep less (`Experts.joins`); the rms norm of fp32 on a CPU keeps 2 b D more.
    """
    m, e, (T, b, both) = config.model, config.moe, _sizes(config)
    half, (tokens, image), D = b == 2, _seen(config), m.hidden_size
    token, record, widest = 2.0 * (8 * D + 8) + 7 * b * D + 4 * m.num_heads, 0.0, float(both * m.ffn_width)
    seen, (more, pairs) = 0, _attending(config)
    token += more
    token += 2 * b * D if m.qk_norm != "none" or m.positions == "rope" else 0
    if m.qk_norm != "none":
        token += b * D + (8 * D if half else 0) + (16 if m.qk_norm == "layer" else 8) * m.num_heads
    if routed:
        K, F = e.rule.active(e.num_experts), e.expert_width
        loop = not exchanged and (e.backend == "loop" or (e.backend == "auto" and bool(D * b % 16 or F * b % 16)))
        decisions, factorised = _decisions(config), e.experts == "factorised"
        experts, listed = K * b * (D + (both - 1) * F if loop else 2 * D + both * F), 0 if factorised else K
        token += (factors.kept(config, b, decisions) if factorised else experts) + b * both * e.shared_width
        copied = half and (factorised or e.shared_width > 0)
        token += (4 * D if "token" in e.router_input or not half else 0) + b * D * copied
        sees = 1.0 if tokens else (1 / T if image else 0.0)  # vectors that are not the places', for each token
        record = decisions * (8 * (e.num_experts + e.null_experts) + 12 * listed)
        token += record + decisions * 36 * listed
        if e.router == "prototype":
            token += decisions * (4 * e.num_experts + 12) + sees * 4 * e.num_experts
        seen = image * (4 * D + 8) + (4 * D if half and "time" in e.router_input else 0)
        widest = factors.widest(config) if factorised else (K * D if loop else K * both * F)
    else:
        token += b * D + b * both * m.ffn_width
    return T * token + (7 * b + 8) * D + seen, T * (b * D + record), T * b * (2 * D + max(3 * D, widest, pairs))


def _attending(config: Config) -> tuple[float, int]:
    """Bytes that experts of attention keep of a token beside what dense maps do, and the numbers of its widest pairs.

    2 b K D (H + 1) of H K pairs that go into both products and come out; 72 H K + 8 (H E + H + 1) of their plans; in
    bf16 4 D for the gates. Less what of qkv is kept for the values alone, 2 b D where queries and keys are turned or in
    bf16 normalised, and the b D of another layout where they are normalised.
    """
    m, e, b = config.model, config.moe, _sizes(config)[1]
    D, H, K, E = m.hidden_size, m.num_heads, e.attention_top_k, e.attention_experts
    if not E:
        return 0.0, 0
    half, normed = b == 2, m.qk_norm != "none"
    less = b * D * (normed + 2 * (half if normed else m.positions == "rope"))
    more = 2 * b * K * D * (H + 1) + 72 * H * K + 8 * (H * E + H + 1) + (4 * D if half else 0)
    return float(more - less), H * K * D


def _share(parameters: Iterable[tuple[str, Tensor]], config: Config, way: Way, d: int) -> Counter[str]:
    """What one device has of these parameters: "held" and "replicated" (or "replicated experts") are numbers of them.

    FSDP2 cuts along the first dimension, into slices as long as the longest (`fully_shard` pads), all but experts that
    are split. Bytes: it gathers "whole" weights as `parallel.gather` says, a router's in float32, makes "gradients" of
    them, and sums those in float32 ("scattered"). Autocast's "copy" (or "expert copy") is of whole weights, also where
    slices are held, but not of those gathered in bf16. Source: torch.distributed.fsdp, `_fsdp_param_group.py` (2.14).
    """
    n, size = config.plan.devices, 2 if config.parallel.gather == "bfloat16" else 4
    stacked = config.moe.experts == "stacked"
    cast = 0 if _sizes(config)[1] == 4 else 2
    found: Counter[str] = Counter()
    for name, p in parameters:
        values, kind = p.numel(), " experts" if stacked and ".experts." in name else ""
        mine = values // d if kind else values
        if way == "FSDP2" and (d == 1 or not kind):
            mine = -(-p.shape[0] // n) * (values // p.shape[0])
            found["whole"] += n * mine * (4 if ".router." in name else size)
            found["gradients"] += size * values
            found["scattered"] += 4 * n * mine
            found["expert copy" if kind else "copy"] += cast * values * (size == 4)
        else:
            found["replicated" + kind] += mine
            found["expert copy" if kind else "copy"] += cast * mine
        found["held"] += mine
    return found


def _gathered(parts: list[Counter[str]], outside: Counter[str]) -> tuple[int, int]:
    """Under FSDP2: most bytes of whole weights and gradients at a time, and of those that a micro-batch gathers.

    At most there are a block's weights and gradients, its predecessor's weights (gathered ahead), its successor's
    gradients (being sent), and all that is outside the blocks. A block's are gathered forward and again backward.
    """
    around = zip([Counter[str](), *parts], parts, [*parts[1:], Counter[str]()], strict=False)
    most = max(a["whole"] + x["whole"] + x["gradients"] + z["scattered"] for a, x, z in around)
    sent = sum(2 * x["whole"] + x["scattered"] for x in parts) + outside["whole"] + outside["scattered"]
    return most + outside["whole"] + outside["gradients"], sent


def needs(
    config: Config, model: DiTMoETransformer2DModel, way: Way, d: int, images: int, checkpointing: bool = False
) -> Needs:
    """What each of `plan.devices` devices needs for micro-batches of so many images, experts split over d of them.

    It holds 1 / d of the experts, and of the rest everything (DDP, with 4 B a parameter for its buckets: Accelerate
    leaves gradient_as_bucket_view off) or a slice (FSDP2, with d = 1 of experts too). `model` may be on "meta".

    Peak: when the backward pass begins (all activations, of gradients a block's, or all where they accumulate) or ends
    (the reverse), with what a block passes on and with checkpointing has again; or, then, when the forward pass ends:
    autocast keeps its copies until there, experts' until the end of their block.

    Muon's own room, a few copies of its largest group of equal matrices after the backward pass, is not counted.

    Sent: X (n - 1) / n for an all-gather or reduce-scatter of X bytes, twice that for a ring all-reduce (Patarasuk and
    Yuan, 2009), of split experts over n / d devices. An all-to-all sends S K D b (d - 1) / d at even load: two in each
    direction, with checkpointing two more. Where a step looks ahead, each micro-batch has one more pass forward.
    """
    n, again, accumulates, ahead = (
        config.plan.devices,
        checkpointing,
        config.train.accumulation > 1,
        looks_ahead(config),
    )
    routed, (T, b, _) = _routed(config), _sizes(config)
    moved = matrices(model, experts=config.train.muon_on == "all") if config.train.optimizer == "muon" else {}
    outside = _share((x for x in model.named_parameters() if not x[0].startswith("blocks.")), config, way, d)
    parts = [_share(block.named_parameters(), config, way, d) for block in model.blocks]
    total, (most, sent) = sum(parts, outside), _gathered(parts, outside)
    sent += sum(part["whole"] for part in parts) * ahead
    wire = most + 4 * (total["replicated"] + (total["replicated experts"] if d == 1 else 0)) * (n > 1)

    rows = 0 if d == 1 else images * T * config.moe.rule.active(config.moe.num_experts) * config.model.hidden_size * b
    sizes = [[images * x for x in activations(config, experts, d > 1)] for experts in routed]
    copies = [x["copy"] + x["expert copy"] for x in parts]
    active = sum(kept if again else saved for saved, kept, _ in sizes) + images * refinement(config)
    there = active if again else active + sum(copies)
    one = max(  # block at work; rows of tokens are there twice, as sent and as received
        passing + 2 * rows * experts + copy + (saved + copy) * again
        for (saved, _, passing), experts, copy in zip(sizes, routed, copies, strict=True)
    )
    momenta = sum(p.numel() // (d if ".experts." in n else 1) for n, p in model.named_parameters() if n in moved)
    moments = 8 * total["held"] - 4 * momenta
    gradients, block = 4 * total["held"], 4 * (total["held"] - outside["held"]) / len(parts)
    early = gradients if accumulates else 0
    forward = total["copy"] + max(size[0] + x["expert copy"] for size, x in zip(sizes, parts, strict=True))
    moving = max(there + one + (early or block), there / len(parts) + one + gradients)
    moving = max(moving, there + forward + early) if again else moving
    return Needs(
        *(4 * total["held"], 4 * total["held"], moments, 4 * total["held"]),
        buffers=wire + total["copy"] + (max if again else sum)(x["expert copy"] for x in parts),
        activations=active + max(size[0] for size in sizes) * again,
        peak=8 * total["held"] + moments + wire + moving,
        all_reduce=8 * (total["replicated"] * (n - 1) / n + total["replicated experts"] * (n - d) / n),
        gather_scatter=config.train.accumulation * sent * (n - 1) / n,
        all_to_all=config.train.accumulation * (4 + 2 * again + 2 * ahead) * rows * (d - 1) / d * sum(routed),
    )


def table(config: Config, model: DiTMoETransformer2DModel, images: int) -> str:
    """The plan as text, for micro-batches of so many images: two columns for each way to use the devices.

    Experts are split over `parallel.experts` devices, or where that is 1 over as many as send least of those that fit,
    or else need least memory. The step's time is its arithmetic alone, at `plan.efficiency`; sending may hide behind.
    """
    plan, count, degrees, times = config.plan, flops(config), _degrees(config), config.train.accumulation
    large = sum(p.numel() for p in model.parameters()) > 1e7
    muon = config.train.optimizer == "muon"  # which FSDP2's slices do not go with
    trunk, whole = (muon_work(model, experts=x)[2] if muon else 0 for x in (False, config.train.muon_on == "all"))
    usable, (unit, scale) = USABLE * plan.memory * 1e9, ("GB", 1e9) if large else ("MB", 1e6)

    def column(way: Way, degrees: list[int], checkpointing: bool) -> list[str]:
        at = partial(needs, config, model, way)
        found = {d: at(d, images, checkpointing) for d in degrees}
        fitting = [d for d in degrees if found[d].peak <= usable]
        d = min(fitting or degrees, key=lambda d: sum(found[d][7:]) if fitting else found[d].peak)
        largest = bisect_right(range(1, 2**20), usable, key=lambda size: at(d, size, checkpointing).peak)
        most = f"{'>' * (largest == 2**20 - 1)}{largest:,}" if largest else "none"
        more = trunk + (whole - trunk) / d  # a device makes its own experts orthogonal
        passes = count.training(checkpointing) + count.forward * looks_ahead(config)
        work = (times * images * passes + more) / plan.tflops / 1e12
        seconds = [_cell(x, 4) for x in (work / plan.efficiency, sum(found[d][7:]) / plan.bandwidth / 1e9)]
        sizes = [_cell(size / scale) for size in found[d]]
        return [way, str(d), _cell(checkpointing), *sizes[:7], _cell(bool(fitting)), most, *sizes[7:], *seconds]

    rests: tuple[Way, ...] = ("DDP", "FSDP2") if plan.devices > 1 and not muon else ("DDP",)
    columns = [column(way, some, again) for some in ([1], degrees) if some for way in rests for again in (False, True)]
    head = (
        f"plan (a calculation, not a run): {plan.devices} devices of {plan.memory:g} GB ({USABLE:.0%} usable), "
        f"{plan.tflops:g} TFLOP/s at {plan.efficiency:.0%}, {plan.bandwidth:g} GB/s\n"
        f"micro-batches of {images}, accumulation {times}, {'bf16 autocast' if _sizes(config)[1] == 2 else 'fp32'}, "
        f"FSDP2 gathers {config.parallel.gather}\n"
        f"{count.forward / 1e9:.2f} GFLOP an image forward, {count.training(False) / 1e9:.2f} in training, "
        f"{count.training(True) / 1e9:.2f} with gradient checkpointing" + f"; Muon {whole / 1e9:.3g} a step more" * muon
    )
    rows = zip(_ROWS, *columns, strict=True)
    return "\n".join([head, *(f"{name.format(unit):28}" + "".join(f"{x:>11}" for x in row) for name, *row in rows)])


def _degrees(config: Config) -> list[int]:
    """Over how many devices experts may be split. ValueError where `parallel` asks for what cannot be."""
    n, E, asked = config.plan.devices, config.moe.num_experts, config.parallel.experts
    if n % asked or E % asked:
        raise ValueError(f"parallel.experts {asked} must divide plan.devices {n} and moe.num_experts {E}")
    if config.parallel.shard and n == 1:
        raise ValueError("parallel.shard needs several devices, but plan.devices is 1")
    if config.parallel.gather == "bfloat16" and config.train.precision == "fp32":
        raise ValueError("parallel.gather bfloat16 needs --train.precision bf16, not fp32")
    common = math.gcd(n, E) if any(_routed(config)) and config.moe.experts == "stacked" else 1
    return [asked] if asked > 1 else [d for d in range(2, common + 1) if common % d == 0]


def _cell(value: float, digits: int = 3) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.{digits}f}"
    if 0 < value < 10.0 ** (1 - digits):
        return f"{value:.1e}"
    return text if len(text) <= 10 else f"{value:.3e}"


def describe(config: Config) -> str:
    """The configuration as JSON and the parameter counts; allocates nothing, reads no images."""
    with torch.device("meta"):
        classes = [{"digits": 10, "fashion": 10}.get(part.name, 0) for part, _ in config.data.sets()]
        known = sum(classes) if all(classes) else 0
        model = build(config, known if config.model.num_classes is None else config.model.num_classes)
    pipeline.assemble(model, config, {})  # what the samplers refuse is refused here too
    total, activated = count_parameters(model)
    counts = f"{total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M activated by a token"
    if config.model.num_classes is None and not known:
        counts += ", without the label table, whose size the data set decides"
    if config.plan.devices:
        counts += "\n" + table(config, model, micro_batch_size(config.train, config.plan.devices))
    return json.dumps(to_dict(config), indent=2) + "\n" + counts

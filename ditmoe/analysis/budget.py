"""What a run would need on many devices: memory, arithmetic and traffic, calculated and not run.

One process a GPU, float32 parameters, `train.precision` bf16 (autocast; "auto" counts as bf16) or fp32.

Shapes: T tokens of an image, D width, E experts, K experts per token, F hidden width, S tokens of a micro-batch, n
devices, d of them share a layer's experts; m is 2 for swiglu, 1 for gelu; b is 2 bytes in bf16, 4 in fp32.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import Tensor

from ..config.experts import has_experts
from ..config.sections import Config, looks_ahead
from ..model import DiTMoETransformer2DModel
from ..model.layers import Refiner
from ..moe.router import MLP_WIDTH
from ..training.muon import matrices

Way = Literal["DDP", "FSDP2"]  # of all but split experts; FSDP2 on two devices or more


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
    """Matrix products of one image: of a weight twice its size for every row that it is multiplied with, and attention.

    Backward, each product has two, sums one where there is a contrastive loss. Source: as torch.utils.flop_counter.
    """
    m, e, (T, _, both) = config.model, config.moe, _sizes(config)
    D, H, pixels = m.hidden_size, max(1, m.head_experts), T * m.in_channels * m.patch_size**2
    A = m.attention_width
    maps = 8 * T * D * A  # qkv and projection
    if e.attention_experts:  # queries and keys; the experts; gates of every head
        maps = 4 * T * D * (A * (1 + e.attention_top_k) + m.num_heads * e.attention_experts)
    choices, factorised = e.num_experts + e.null_experts, e.experts == "factorised"
    (tokens, image), active = _seen(config), e.rule.active(e.num_experts) * e.expert_width
    router = 2 * MLP_WIDTH * (D + choices) if e.router == "mlp" else 2 * D * choices  # of a vector that it sees
    router *= T * tokens + image  # not of places, which it sees once for all images
    blocks, layers = 0.0, sum(routed_blocks(config))
    for routed in routed_blocks(config):
        blocks += 12 * D**2 + maps + 4 * T**2 * A + 18 * T * D * m.local_conv  # adaLN; attention's maps; attention
        if not routed:
            blocks += 2 * D * T * both * m.ffn_width
            continue
        blocks += 2 * D * T * both * e.shared_width + (2 * T * D if e.shared_gate else 0)
        if factorised:
            C, F = e.factors(D, m.activation), e.expert_width
            blocks += 2 * C * (2 * D + both * F) * T + 4 * e.num_experts * C * T * _decisions(config)
        else:
            blocks += 2 * D * T * both * active + 16 * T * (both - 1) * active * e.biases
    blocks += m.depth // 2 * 2 * T * D**2 * m.long_skips
    routers = router * (layers if e.scope == "layer" else min(layers, 1))
    sums = routers if e.router == "prototype" else 0
    across, refined = _refined(config)
    ends = 2 * D * (pixels + 256 + D) + 4 * D**2 + refined  # patches, time; adaLN of the final layer; convolutions
    ends += 2 * D * H * T * m.patch_size**2 * across + (2 * D * H if H > 1 else 0)  # heads and their gate
    blocks += routers + sums
    return Flops(blocks + ends, blocks, 2 * (blocks - sums + ends) + (sums if e.contrastive_weight else 0))


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


def routed_blocks(config: Config) -> list[bool]:
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

    Kept: the block's input, the router's record. Passing: gradients of the residual stream and of the widest layer.

    Source: what model/ and moe/ leave with autograd on a GPU; a test counts it with saved_tensors_hooks.
    The rms norm of fp32 on a CPU keeps 2 b D more.
    """
    m, e, (T, b, both) = config.model, config.moe, _sizes(config)
    half, normed, D, (more, pairs) = b == 2, m.qk_norm != "none", m.hidden_size, _attending(config)
    A = m.attention_width
    token = 2.0 * (8 * D + 8) + b * D  # both norms in float32, the input of qkv
    token += b * D * (m.local_conv or m.long_skips * (m.depth // 2) / m.depth)  # a convolution's input is a skip's too
    token += b * (4 * A + 2 * D) + 4 * m.num_heads  # qkv, attention, its statistics and projection, and what is gated
    token += more + (2 * b * A if normed or m.positions == "rope" else 0)  # experts of attention; q and k, changed
    if normed:  # in bf16 q and k in float32; statistics
        token += (8 * A if half else 0) + (16 if m.qk_norm == "layer" else 8) * m.num_heads
    image_too = (7 * b + 8) * D  # adaLN
    if not routed:
        token += b * D + b * both * m.ffn_width
        return T * token + image_too, T * b * D, T * b * (2 * D + max(3 * A, both * m.ffn_width, pairs))
    K, F, E, factorised = e.rule.active(e.num_experts), e.expert_width, e.num_experts, e.experts == "factorised"
    (tokens, image), decisions = _seen(config), _decisions(config)
    token += b * both * e.shared_width
    if factorised:
        C = e.factors(D, m.activation)  # of each of both layers; a decision weighs them
        token += b * (4 * C + both * F) + decisions * (2 * b * C + (2 * E if half else 0))
        listed, widest = 0.0, 2.0 * C + both * F
    elif not exchanged and (e.backend == "loop" or (e.backend == "auto" and bool(D * b % 16 or F * b % 16))):
        token, listed, widest = token + K * b * (D + (both - 1) * F), K, K * D  # the loop gathers, activates again
    else:
        token, listed, widest = token + K * b * (2 * D + both * F), K, K * both * F
    token += 4 * D if "token" in e.router_input or not half else 0  # the router's input
    token += b * D if half and (factorised or e.shared_width > 0) else 0  # the shared expert's; in fp32 they are one
    record = decisions * (8 * (E + e.null_experts) + 12 * listed)
    token += record + decisions * 36 * listed
    if e.router == "prototype":  # products before they are cosines; who serves a token or image that is seen
        token += decisions * (4 * E + 12) + (1.0 if tokens else min(image, 1) / T) * 4 * E
    image_too += image * (4 * D + 8) + (4 * D if half and "time" in e.router_input else 0)  # time and label
    return T * token + image_too, T * (b * D + record), T * b * (2 * D + max(3 * A, widest, pairs))


def _attending(config: Config) -> tuple[float, int]:
    """Bytes that experts of attention keep of a token beside what dense maps do, and the numbers of its widest pairs.

    2 b K (H D + A) of H K pairs that go into both products and come out; 72 H K + 8 (H E + H + 1) of their plans; in
    bf16 4 D for the gates. Less what of qkv is kept for the values alone, 2 b A where queries and keys are turned or in
    bf16 normalised.
    """
    m, e, b = config.model, config.moe, _sizes(config)[1]
    D, A, H, K, E = m.hidden_size, m.attention_width, m.num_heads, e.attention_top_k, e.attention_experts
    if not E:
        return 0.0, 0
    half, normed = b == 2, m.qk_norm != "none"
    less = 2 * b * A * (half if normed else m.positions == "rope")
    more = 2 * b * K * (H * D + A) + 72 * H * K + 8 * (H * E + H + 1) + (4 * D if half else 0)
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
    n, again, ahead = config.plan.devices, checkpointing, looks_ahead(config)
    routed, (T, b, _) = routed_blocks(config), _sizes(config)
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
    early = gradients if config.train.accumulation > 1 else 0
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

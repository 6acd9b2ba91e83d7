"""Dense layers cut by what is active where: experts of noise levels, classes or data sets, and what all need.

Shapes: N images, S tokens of a block, D width, L layers that are cut, E domains with an expert each, C classes, H units
of a dense layer, of which a token has R; k kinds of images: domains, or classes before these are put together.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.convert import DomainKind
from ..model import DiTMoETransformer2DModel
from ..moe import FeedForward, Router
from ..objective import NUM_TIMESTEPS
from .prune import Batches
from .rebuild import dense_layers, with_experts
from .split import CHOICE, PART, balanced, fitted, tokens_of


class ByDomain(NamedTuple):
    """The network; the domains of times 0..1000 (1001,) or of labels (C + 1,), int64; the share the router knows."""

    network: DiTMoETransformer2DModel
    domain: Tensor
    known: float


def split_by_domain(
    net: DiTMoETransformer2DModel, num_experts: int, batches: Batches, domains: DomainKind, *,
    sets: Tensor | None = None, blocks: Literal["all", "every-second"] = "all", keep: float = 0.5, steps: int = 1000,
    seed: int = 0,
) -> ByDomain:  # fmt: skip
    """The dense network with its layers cut by domain, of which an image has the R most active units; `net` stays.

    A unit is as active as the mean of |what it gives to the second matrix|. The shared expert has units that all have
    among their R, a domain's expert the rest of its R (`chosen`): two may have units in common, and nobody some.
    Weights are 1, so an image gets what the dense layer makes of its R units.

    One router decides for all layers before the first block, by the time or the label alone: an mlp that is fitted to
    the domains (`fitted`), and that no loss trains further. The null label has the expert that has most of its R units.

    Args:
        net: Without experts. With gelu a silent shared expert has the output bias where domains have no unit in common.
        num_experts: E: equal ranges of time; classes that are alike in what is active, as many each; or data sets.
        batches: Noisy images x_t (N, C, H, W), t (N,) on 0..1000, labels (N,) or None, of which tokens are taken.
        domains: "time", "class" or "data".
        sets: (C,) int64, for "data": the data set of each class.
        blocks: Which are cut.
        keep: R / H; R is rounded down to a multiple of 8.
        steps: Of the fit of the router.
        seed: Of tokens and of the fit.

    Raises:
        ValueError: The network has experts, or no labels to tell domains by, or the numbers do not fit, or a domain or
            class has no images.

    Source: Read-ME (arXiv 2410.19123), and its code for the measure. Its domains are data sets, and its router, fitted
    to what is active in each token, a small transformer that sees the tokens.
    """
    dense, E, H, C = [*dense_layers(net, blocks).values()], num_experts, int(net.config.ffn_width), net.null_label
    assert (sets is None) == (domains != "data"), "sets are for data"
    R = check_domains(net, E, domains, 0 if sets is None else int(sets.max()) + 1, keep)
    generator, batches = torch.Generator().manual_seed(seed), list(batches)
    seen = tokens_of(net, dense, batches, generator)
    if domains == "time":
        of = (torch.arange(NUM_TIMESTEPS + 1) * E // NUM_TIMESTEPS).clamp_max(E - 1)
        kinds = of[torch.cat([t for _, t, _ in batches]).long()]
    else:
        of = torch.arange(C or 0) if sets is None else sets
        kinds = of[torch.cat([y for _, _, y in batches if y is not None])]
    active = activity(dense, seen, kinds, C if domains == "class" and C else E)
    if domains == "class":
        groups = balanced(F.normalize(active, dim=2).transpose(0, 1).flatten(1), E)  # (E, C / E)
        groups = groups[groups.amin(dim=1).argsort()]
        of[groups] = torch.arange(E).unsqueeze(1).expand_as(groups)
        active = active[:, groups].mean(dim=2)
    common, own = chosen(active, R)
    if domains != "time":
        free = tokens_of(net, dense, [(x_t, t, None) for x_t, t, _ in batches], generator)
        best = activity(dense, free, torch.zeros_like(kinds), 1).topk(R, dim=2).indices  # (L, 1, R)
        among = torch.zeros(len(own), 1, H).scatter(2, best, 1.0).expand(-1, E, -1).gather(2, own)
        of = torch.cat([of, among.sum(dim=(0, 2)).argmax().view(1)])
    router, known = _routed(net, of, E, by_time=domains == "time", steps=steps, generator=generator)
    routers = {f"router.{key}": value for key, value in router.state_dict().items()}
    by = "time" if domains == "time" else "label"
    settings = {**CHOICE, "top_k": 1, "router_scope": "shared", "router_input": by}
    return ByDomain(with_experts(net, blocks, [*zip(own, common, strict=True)], routers, settings), of, known)


def check_domains(
    net: DiTMoETransformer2DModel, num_experts: int, domains: DomainKind, num_sets: int, keep: float
) -> int:
    """R. ValueError where `split_by_domain` can tell without an image that it cannot be, of so many data sets."""
    E, H, C = num_experts, int(net.config.ffn_width), net.null_label
    if E < 2:
        raise ValueError(f"num_experts is {E}; it must be 2 or more")
    if domains != "time" and C is None:
        raise ValueError(f"domains {domains} are told by the label, and the model has none; give time")
    if domains == "class" and C and C % E:
        raise ValueError(f"num_experts is {E}; with domains class it must divide the model's {C} classes")
    if domains == "data" and num_sets < 2:
        raise ValueError("domains data needs a model of several sets (data.mixture), and this one is of one")
    if domains == "data" and num_sets != E:
        raise ValueError(f"num_experts is {E}, and the model was trained on {num_sets} data sets; give {num_sets}")
    R = int(keep * H) // 8 * 8
    if not 0 < R < H:
        raise ValueError(f"keep is {keep}; of ffn_width {H} it must leave 8 units or more, and not all")
    return R


@torch.no_grad()
def activity(layers: Sequence[FeedForward], seen: Sequence[Tensor], kinds: Tensor, num_kinds: int) -> Tensor:
    """(L, k, H): by kind of image the mean size of what a unit makes of tokens, (S, D) of each layer, S / N an image.

    `kinds` (N,) int64 says what the images are. ValueError where there is none of a kind.
    """
    counts = torch.bincount(kinds, minlength=num_kinds)
    if not counts.all():
        lacking = int(counts.argmin())
        raise ValueError(f"none of {len(kinds)} images is of domain or class {lacking}; measure more with --num")
    each = len(seen[0]) // len(kinds)
    sums = torch.zeros(len(layers), num_kinds, layers[0].fc2.weight.shape[1])
    for layer, tokens, total in zip(layers, seen, sums, strict=True):
        for x, kind in zip(tokens.split(PART), kinds.repeat_interleave(each).split(PART), strict=True):
            total.index_add_(0, kind, layer.hidden(x.to(layer.fc1.weight)).abs().float().cpu())
    return sums / (each * counts.unsqueeze(1))


def chosen(active: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Of activities (L, E, H) the units of the shared expert (L, S), and of each domain's (L, E, R - S).

    Together they are the R most active of the domain. S is what all domains have in common in the layer where that is
    least, rounded down to a multiple of 8; where it is more, every expert has the rest. ValueError where it is all.
    """
    order = active.argsort(dim=2, descending=True, stable=True)
    worst = order.argsort(dim=2).amax(dim=1)  # (L, H): places in the domain that has least use for a unit
    S = int((worst < R).sum(dim=1).min()) // 8 * 8
    if S == R:
        raise ValueError(
            f"the {R} most active units are the same in all domains: there is nothing to choose; keep less"
        )
    common, top = worst.argsort(dim=1, stable=True)[:, :S], order[:, :, :R]
    always = torch.zeros_like(worst, dtype=torch.bool).scatter(1, common, True)
    rare = ~always.unsqueeze(1).expand_as(order).gather(2, top)
    return common, top[rare].view(*top.shape[:2], R - S)


def _routed(
    net: DiTMoETransformer2DModel, of: Tensor, E: int, *, by_time: bool, steps: int, generator: torch.Generator
) -> tuple[Router, float]:
    """A router that knows the expert of whole times 0.. or of labels, `of`, and of how many of them it does."""
    all_of, zero = torch.arange(len(of), device=net.device), torch.zeros(len(of), device=net.device)
    with torch.no_grad():
        condition = net.condition(zero, all_of if by_time else zero, None if by_time else all_of)
        inputs: Any = ("time" if by_time else "label",)
        seen = Router(int(net.config.hidden_size), E, inputs=inputs).seen(zero, condition)[0][:, 0].cpu()
    router, _ = fitted(seen, F.one_hot(of, E).float(), steps, generator)
    with torch.no_grad():
        return router, float((router([seen.unsqueeze(1)])[0][:, 0].argmax(dim=1) == of).float().mean())

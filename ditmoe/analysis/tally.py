"""What every layer's experts did for some images: counted by image, place and noise level, and by the size of output.

Shapes: N images (n of each of Y classes), B time bins, T tokens of an image, E experts, D width; R rows that share a
decision, P (row, expert) pairs.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.sections import ObjectiveConfig
from ..model import DiTMoETransformer2DModel, tokens_per_image
from ..moe import Experts, FactorisedExperts, MoELayer, plan_of
from .routing import Array, passes


class Tally(NamedTuple):
    """What one layer's experts did for N images at B noise levels each.

    Attributes:
        counts: (B, Y, T, E) int64, assignments of tokens.
        by_place: (N, T, E) int64, of each image over all noise levels.
        by_time: (N, B, E) int64, of each image over all places.
        pairs: (E, E), tokens that both experts serve; on the diagonal those that one serves.
        norms: (E,), sum over tokens of |w_e Expert_e(x)|.
        routed: Of the norms of both parts of a token's output the routed experts' share, all tokens together; 1 where
            no expert is shared.
        undecided: bits, mean log2 of how many experts serve the token of an assignment: of its expert they cannot be
            told, log2 K where all have K.
    """

    counts: Array
    by_place: Array
    by_time: Array
    pairs: Array
    norms: Array
    routed: float
    undecided: float


@torch.no_grad()
def tally(
    net: DiTMoETransformer2DModel, config: ObjectiveConfig, x: Tensor, classes: Sequence[int], num_bins: int, seed: int
) -> list[Tally]:
    """A tally a layer with experts; the arguments are those of `routing.count_experts`."""
    (Y, n), T, E = x.shape[:2], tokens_per_image(net), net.config.num_experts
    layers = [m for m in net.modules() if isinstance(m, MoELayer)]
    cells = [torch.zeros(Y * n, T, E, dtype=torch.int64) for _ in layers]
    counts = [torch.zeros(num_bins, Y, T, E, dtype=torch.int64) for _ in layers]
    by_time = [torch.zeros(Y * n, num_bins, E, dtype=torch.int64) for _ in layers]
    pairs, bits = torch.zeros(len(layers), E, E, dtype=torch.float64), torch.zeros(len(layers), dtype=torch.float64)
    y = torch.arange(Y).repeat_interleave(n)
    with norms_of(layers) as norms, parts_of(layers) as parts:
        for b, rows, routing in passes(net, config, x, classes, num_bins, seed):
            for i, record in enumerate(routing):
                decided = record.served().cpu()[..., :E]  # without null experts
                served = decided.expand(len(rows), T, E)
                cells[i][rows] += served
                counts[i][b].index_add_(0, y[rows], served)
                by_time[i][rows, b] = served.sum(dim=1)
                flat = decided.reshape(-1, E).double() * (len(rows) * T / decided[..., 0].numel()) ** 0.5
                pairs[i] += flat.T @ flat
                many = decided.sum(dim=-1).double()
                bits[i] += (many * many.clamp_min(1).log2()).sum() * (len(rows) * T / many.numel())
    return [
        Tally(
            counts[i].numpy(), cells[i].numpy(), by_time[i].numpy(), pairs[i].numpy(), norms[i],
            routed=float(parts[i][0] / parts[i].sum()) if parts[i].any() else math.nan,
            undecided=float(bits[i]) / max(1, int(counts[i].sum())),
        )
        for i in range(len(layers))
    ]  # fmt: skip


@contextmanager
def norms_of(layers: Sequence[MoELayer]) -> Iterator[list[Array]]:
    """For each layer (E,) float64, the sum over tokens of |w_e Expert_e(x)|, of all that passes while this is open.

    Of factorised experts it is their parts of the second layer's sum, as the output is none (`FactorisedExperts`).
    """
    sums = [np.zeros(layer.experts.num_experts) for layer in layers]

    def note(total: Array, experts: Experts | FactorisedExperts, given: tuple[Tensor, Any], _options: Any) -> None:
        x, plan = given
        if isinstance(experts, FactorisedExperts):
            total[:] += experts.norms(x, plan).cpu().numpy()
            return
        some = torch.arange(len(plan.row), device=x.device)
        alone = plan_of(plan.expert, plan.weight, some, len(total), 1)  # every pair a row of its own
        parts = experts.forward(x[plan.row], alone).double().norm(dim=-1).sum(dim=-1)  # (P,)
        np.add.at(total, plan.expert.cpu().numpy(), parts.cpu().numpy())

    with ExitStack() as stack:
        for layer, total in zip(layers, sums, strict=True):
            hook = layer.experts.register_forward_pre_hook(partial(note, total), with_kwargs=True)
            stack.callback(hook.remove)
        yield sums


@contextmanager
def parts_of(layers: Sequence[MoELayer]) -> Iterator[list[Array]]:
    """For each layer (2,) float64, sums over tokens of |routed part| and |shared part|, of all that passes meanwhile.

    That is while this is open; the shared part is computed once more.
    """
    sums = [np.zeros(2) for _ in layers]

    def note(total: Array, layer: MoELayer, _experts: Any, given: tuple[Tensor, Any], routed: Tensor) -> None:
        total += [float(part.double().norm(dim=-1).sum()) for part in (routed, layer.without_routed(given[0]))]

    with ExitStack() as stack:
        for layer, total in zip(layers, sums, strict=True):
            stack.callback(layer.experts.register_forward_hook(partial(note, total, layer)).remove)
        yield sums

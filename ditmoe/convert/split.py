"""Dense layers cut into experts of similar hidden units, and routers that know how much each will say of a token.

Shapes: N images, S tokens of a block, D width, E experts, F hidden units of one, H = E F of a dense layer.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import DiTMoETransformer2DModel, tokens_per_image
from ..moe import FeedForward, Router
from .prune import Batches
from .rebuild import dense_layers, with_experts

TOKENS = 20_000  # of a block that are looked at, about
LLOYD = 20  # steps of k-means at most
BATCH, RATE = 512, 3e-3  # of the fit, with Adam; the rate falls to 0
FLOOR = 1e-2  # of a block's mean norm: what is less is as good as nothing
PART = 2048  # tokens of which all hidden units are in memory
CHOICE: dict[str, Any] = {  # settings of a router that is fitted to choose parts of a dense layer, and stays
    "router_kind": "mlp", "router_score": "softmax", "router_weights": "one", "router_renormalize": False,
    "router_scale": 1.0, "router_bias": False,
}  # fmt: skip


class Split(NamedTuple):
    """The network; of its blocks what share of experts serves a token, and the error of the logarithms of norms."""

    network: DiTMoETransformer2DModel
    served: list[float]
    error: list[float]


def split(
    net: DiTMoETransformer2DModel, num_experts: int, batches: Batches, *,
    blocks: Literal["all", "every-second"] = "all", tau: float = 0.5, steps: int = 1000, seed: int = 0,
) -> Split:  # fmt: skip
    """The dense network with its layers cut into E experts each, of which a token has a number of its own; `net` stays.

    Experts are equal clusters of hidden units (`clusters`); the weight of a chosen one is 1, so all together are the
    dense layer. A router (mlp) is fitted to log |Expert_e(x)| of the tokens; by its softmax, `relative` chooses those
    whose norm is thought to be (1 - tau) of the largest or more: eq. 8 of the paper, tau 0 one and tau 1 all of them.
    Nothing that is lost trains the router further. Units must be idle for most tokens, or little can be left out: train
    with `--moe.hoyer-weight` before. With gelu a silent shared expert has the output bias.

    Args:
        net: Without experts.
        num_experts: E, which divides the width of the dense layers.
        batches: Noisy images x_t (N, C, H, W), t (N,) on 0..1000, labels (N,) or None, of which tokens are taken.
        blocks: Which are cut.
        tau: Of the rule; it may be another one while drawing. top_k is what tokens then have on average.
        steps: Of the fit of a router.
        seed: Of tokens and fits.

    Raises:
        ValueError: The network has experts, or E does not divide the width, or there are no images.

    Source: D2DMoE (arXiv 2310.04361), whose routers fit the norms by an mlp with an absolute value; ours fits their
    logarithms, of which a softmax keeps the ratios.
    """
    layers, E, H = dense_layers(net, blocks), num_experts, int(net.config.ffn_width)
    if E < 2 or H % E:
        raise ValueError(f"num_experts is {E}; it must be 2 or more, and divide ffn_width {H}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}; it must lie in [0, 1]")
    generator, routers = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    cuts, served, error = [], [], []
    seen = tokens_of(net, [*layers.values()], batches, generator)
    for (name, layer), tokens in zip(layers.items(), seen, strict=True):
        units = clusters(layer, E)
        router, wrong = fitted(tokens, norms(layer, units, tokens), steps, generator)
        logits = router([tokens.unsqueeze(0)])[0][0].detach()
        served.append(float((logits.softmax(1) >= (1 - tau) * logits.softmax(1).amax(1, True)).float().mean()))
        error.append(wrong)
        routers |= {f"{name}.moe.router.{key}": value for key, value in router.state_dict().items()}
        cuts.append((units, units[:0, 0]))
    settings: dict[str, Any] = {
        **CHOICE, "top_k": max(1, round(E * sum(served) / len(served))), "router_input": "token",
        "router_select": "relative", "router_tau": tau,
    }  # fmt: skip
    return Split(with_experts(net, blocks, cuts, routers, settings), served, error)


@torch.no_grad()
def tokens_of(
    net: DiTMoETransformer2DModel, layers: Sequence[nn.Module], batches: Batches, generator: torch.Generator, *,
    after: bool = False,
) -> list[Tensor]:  # fmt: skip
    """What goes into some layers (or comes out), (S, D) float32 on the CPU each: the same number of tokens an image."""
    batches = list(batches)
    images = sum(len(x) for x, _, _ in batches)
    if not images:
        raise ValueError("no image was given to take tokens of")
    seen: list[list[Tensor]] = [[] for _ in layers]
    some = torch.empty(0)

    def keep(kept: list[Tensor], _module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        z = (out if after else given[0]).float().cpu()
        kept.append(z.gather(1, some.expand(-1, -1, z.shape[2])).flatten(0, 1))

    with ExitStack() as stack:
        for layer, kept in zip(layers, seen, strict=True):
            stack.callback(layer.register_forward_hook(partial(keep, kept)).remove)
        for x_t, t, y in batches:
            order = torch.rand(len(x_t), tokens_per_image(net), generator=generator).argsort(dim=1)
            some = order[:, : -(-TOKENS // images)].unsqueeze(-1)
            net(*(None if v is None else v.to(net.device) for v in (x_t, t, y)))
    return [torch.cat(kept) for kept in seen]


@torch.no_grad()
def clusters(layer: FeedForward, num_experts: int) -> Tensor:
    """(E, F) hidden units in E equal clusters of like rows of the first matrix, `balanced`.

    Rows have length 1 (of swiglu those of gate and up each).
    """
    H = layer.fc2.weight.shape[1]
    weight = layer.fc1.weight.detach().float().cpu().view(-1, H, layer.fc1.weight.shape[1])
    return balanced(F.normalize(weight, dim=2).transpose(0, 1).flatten(1), num_experts)  # of (H, m D)


def balanced(rows: Tensor, num_experts: int) -> Tensor:
    """(E, F): of H = E F rows which are in each of E clusters, in their order: balanced k-means, without chance.

    The first centre is the row most like all, a next one the row farthest from those before it; in a step rows choose,
    those first that would lose most by their second choice, while there is room.
    """
    centres = rows[(rows @ rows.sum(dim=0)).argmax().view(1)]
    while len(centres) < num_experts:
        far = torch.cdist(rows, centres).amin(dim=1)
        centres = torch.cat([centres, rows[far.argmax().view(1)]])
    owner = torch.empty(0)
    for _ in range(LLOYD):
        before, owner = owner, _even(torch.cdist(rows, centres).square())
        if torch.equal(before, owner):
            break
        centres = torch.stack([rows[owner == e].mean(dim=0) for e in range(num_experts)])
    return owner.argsort(stable=True).view(num_experts, -1)


def _even(squares: Tensor) -> Tensor:
    """Who takes each row (H,), by distances (H, E), all as many."""
    H, E = squares.shape
    two = squares.topk(2, dim=1, largest=False).values
    room, owner = torch.full((E,), H // E), torch.empty(H, dtype=torch.int64)
    for h in (two[:, 1] - two[:, 0]).argsort(descending=True, stable=True).tolist():
        e = int(squares[h].masked_fill(room == 0, torch.inf).argmin())
        owner[h] = e
        room[e] -= 1
    return owner


@torch.no_grad()
def norms(layer: FeedForward, units: Tensor, tokens: Tensor) -> Tensor:
    """(S, E): |Expert_e(x)| of experts with these hidden units (E, F) of a dense layer, for tokens (S, D)."""
    parts: Sequence[Tensor] = tokens.split(PART)
    w_out = layer.fc2.weight.float()
    found = []
    for x in parts:
        hidden = layer.hidden(x.to(layer.fc1.weight)).float()
        found.append(torch.stack([(hidden[:, some] @ w_out[:, some].T).norm(dim=1) for some in units], dim=1).cpu())
    return torch.cat(found)


def fitted(tokens: Tensor, norms: Tensor, steps: int, generator: torch.Generator) -> tuple[Router, float]:
    """A router (mlp) whose logits are about the logarithms of norms (S, E) of tokens (S, D), and its mean error."""
    wanted = (norms + FLOOR * norms.mean()).log()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        router = Router(tokens.shape[1], norms.shape[1], kind="mlp")
    assert router.offset is not None
    with torch.no_grad():
        router.offset.copy_(wanted.mean(dim=0))
        router.weight.mul_(0.1)
    adam = torch.optim.Adam(router.parameters(), RATE)
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
        rows = torch.randint(len(tokens), (BATCH,), generator=generator)
        loss = F.mse_loss(router([tokens[rows].unsqueeze(0)])[0][0], wanted[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        return router, float((router([tokens.unsqueeze(0)])[0][0] - wanted).abs().mean())

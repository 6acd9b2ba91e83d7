"""The command centroids: where the tokens of a trained model are, block by block, for routers that take the nearest.

Shapes: n images, T tokens of one, m of them looked at, C channels, D width; S = n m tokens of a block, E centres.

Source: Moirai-MoE (arXiv 2410.10469), whose centres are k-means of a dense model's tokens; even loads are ours.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ..config.checks import plural
from ..config.file import trained_by
from ..config.sample import CentroidsArgs
from ..config.sections import Config
from ..data.open import open_data
from ..files import whole
from ..model import DiTMoETransformer2DModel
from ..objective import NUM_TIMESTEPS, Objective
from ..pipeline import load
from .prune import Batches
from .split import tokens_of

FORWARD = 128  # images in one forward pass
EVEN = 2.5  # largest load over the smallest that a fit looks for; other tokens then have 3 at most, about
LLOYD, PRICED, MOVES = 30, 40, 10  # steps of k-means, of making loads even, and moves of a centre at most
RATE = 0.05  # of prices, in mean distances^2 for each time that a centre has what it should


class Fit(NamedTuple):
    """The centres (E, D) float32 of some tokens, the tokens that are nearest to each (E,), and their mean distance."""

    centres: Tensor
    loads: Tensor
    distance: float

    @property
    def ratio(self) -> float:
        """Largest load over the smallest; infinite where a centre has no tokens."""
        least, most = self.loads.aminmax()
        return float(most / least) if least else math.inf


def run(args: CentroidsArgs) -> None:
    """Write the centres of every block, `blocks.0` (E, D) float32 and so on, with metadata on what they are of.

    Raises:
        ValueError: The folder holds no model of ours, its data are gone, or a block has fewer tokens than centres.
    """
    config, net = trained_by(args.model), load(args.model, fast=True).transformer.eval()
    generator = torch.Generator().manual_seed(args.seed)
    batches = noisy_images(config, net, args.num, generator, FORWARD, args.data_path)
    seen = tokens_seen(net, batches, args.router_input, generator)
    print(f"{len(seen[0])} tokens a block, {plural(args.experts, 'centre')}", flush=True)
    fits: dict[str, Fit] = {}
    for i, tokens in enumerate(seen):
        name = f"blocks.{i}"
        fits[name] = fitted(tokens, args.experts, generator, name)
        uneven = "" if fits[name].ratio <= 3 else ", the most even that was found"
        print(f"{name}: mean distance {fits[name].distance:.3g}, busiest over idlest {fits[name].ratio:.2f}{uneven}")
    facts = {
        "model": str(args.model), "data": config.data.name, "router_input": args.router_input, "images": str(args.num),
        "tokens": str(len(seen[0])), "seed": str(args.seed),
        "loads": json.dumps({name: fit.loads.tolist() for name, fit in fits.items()}),
    }  # fmt: skip
    with whole(args.out) as file:
        file.write(save({name: fit.centres for name, fit in fits.items()}, facts))
    wanted = f"--moe.num-experts {args.experts} --moe.router-input {args.router_input}"
    flags = f"--moe.preset centroid --moe.centroids {quote(str(args.out))} {wanted}"
    print(f"wrote {args.out}; python -m ditmoe train ... {flags}")


def noisy_images(
    config: Config, net: DiTMoETransformer2DModel, num: int, generator: torch.Generator, size: int, path: Path | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches of what a network was trained on, noised to times all over the axis: x_t (n, C, H, W), t (n,), labels.

    Labels are (n,) int64, or None where the network has none. A small set is gone through again; images that cannot be
    used are left out. `path`: of the images, instead of the configuration's. No image is read before the first batch is
    asked for. ValueError where there are none, or more classes than the network knows.
    """
    where = config.data if path is None else replace(config.data, path=path)
    data = open_data(where, size=net.config.sample_size, channels=net.config.in_channels)
    if net.null_label is not None and len(data.id2label) > net.null_label:
        raise ValueError(f"{data.source}: {plural(len(data.id2label), 'class')}, but the model knows {net.null_label}")
    print(f"{plural(num, 'image')}, {data.source}", flush=True)
    order = data.in_proportion(torch.randperm(len(data), generator=generator).tolist(), num)
    if not (rows := data.readable(order)):
        raise ValueError(f"{data.source}: none of {len(order)} images can be used")
    rows = (rows * -(-num // len(rows)))[:num]
    x = torch.cat([data.tensors(rows[i : i + FORWARD]) for i in range(0, num, FORWARD)])
    t = ((torch.arange(num) + 0.5) * (NUM_TIMESTEPS / num)).floor().clamp_min(1)
    x_t, _ = Objective(config.objective).corrupt(x, t, torch.randn(x.shape, generator=generator))
    y = torch.from_numpy(data.labels[rows])
    for some in torch.arange(num).split(size):
        yield x_t[some], t[some], None if net.null_label is None else y[some]


def tokens_seen(
    net: DiTMoETransformer2DModel, batches: Batches, router_input: str, generator: torch.Generator
) -> list[Tensor]:
    """What a router of each block sees of noisy images: of every block the same m of an image, (S, D).

    Args:
        net: in eval mode; its blocks may hold experts or not.
        batches: as of `noisy_images`.
        router_input: "plain": before adaLN modulates them; "token": after.
        generator: of which tokens are looked at.
    """
    plain = router_input == "plain"
    feed_forward = [block.moe if hasattr(block, "moe") else block.mlp for block in net.blocks]
    watched: list[Any] = [block.norm2 for block in net.blocks] if plain else feed_forward
    return tokens_of(net, watched, batches, generator, after=plain)


def fitted(tokens: Tensor, num: int, generator: torch.Generator, name: str = "tokens") -> Fit:
    """Centres of tokens (S, D) with loads that differ by `EVEN` at most, or as little as was found.

    k-means (k-means++, then Lloyd's steps). Then steps in which a busy centre has its price added to the distance^2, so
    that others take tokens of it and move there; loads are those without prices. Where that is not enough, the centre
    with the fewest tokens moves to a random one of the centre with the most, and all begins anew. ValueError where
    fewer tokens are different than `num`.
    """
    centres = _spread(tokens, num, generator, name)
    for _ in range(LLOYD):
        centres = _means(tokens, _distances(tokens, centres).argmin(dim=1), centres)
    best = Fit(centres, torch.zeros(num, dtype=torch.int64), math.inf)
    for _ in range(MOVES):
        price = torch.zeros(num)
        for _ in range(PRICED):
            squares = _distances(tokens, centres)
            least, nearest = squares.min(dim=1)
            fit = Fit(centres, torch.bincount(nearest, minlength=num), float(least.sqrt().mean()))
            if fit.ratio <= best.ratio:
                best = fit
            if fit.ratio <= EVEN:
                return fit
            nearest = (squares + price).argmin(dim=1)
            over = torch.bincount(nearest, minlength=num) * (num / len(tokens)) - 1
            price += RATE * least.mean() * over.clamp_max(1)
            centres = _means(tokens, nearest, centres)
        crowd = (_distances(tokens, best.centres).argmin(dim=1) == best.loads.argmax()).nonzero().flatten()
        chosen = crowd[torch.randint(len(crowd), (1,), generator=generator)]
        centres = best.centres.index_copy(0, best.loads.argmin().view(1), tokens[chosen])
    return best


def _spread(tokens: Tensor, num: int, generator: torch.Generator, name: str) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next centre (num, D) a token, by its distance^2 to them."""
    far = torch.ones(len(tokens))
    chosen: list[Tensor] = []
    for _ in range(num):
        if not far.any():
            raise ValueError(
                f"{name}: {num} centres were asked for, and only {len(chosen)} of its {len(tokens)} tokens differ; "
                f"give fewer --experts, or more images with --num"
            )
        chosen.append(tokens[torch.multinomial(far, 1, generator=generator)])
        away = (tokens - chosen[-1]).square().sum(dim=1)
        far = away if len(chosen) == 1 else torch.minimum(far, away)
    return torch.cat(chosen)


def _means(tokens: Tensor, owner: Tensor, centres: Tensor) -> Tensor:
    """The mean of each centre's tokens, which owner (S,) says; a centre without tokens stays."""
    count = torch.bincount(owner, minlength=len(centres)).unsqueeze(1)
    sums = torch.zeros_like(centres).index_add_(0, owner, tokens)
    return torch.where(count > 0, sums / count.clamp_min(1), centres)


def _distances(tokens: Tensor, centres: Tensor) -> Tensor:
    """(S, E), the squares of the distances."""
    squares = tokens.square().sum(dim=1, keepdim=True) - 2 * tokens @ centres.T + centres.square().sum(dim=1)
    return squares.clamp_min_(0)

"""The router: one logit for every decision and expert, in float32 whatever the model's precision.

Shapes: N images, T tokens of an image, D width, E experts, I inputs.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .noise import keys_of, uniform

if TYPE_CHECKING:
    from .layer import Routing
    from .policy import Steering

Input = Literal["token", "plain", "time", "label", "position"]
Kind = Literal["linear", "mlp", "prototype", "centroid"]
MLP_WIDTH = 128  # D2DMoE's


class Condition(NamedTuple):
    """What there is beside the tokens that the experts get.

    Attributes:
        c: (N, D) what modulates a block: time and label together.
        t: (N, D) the time's embedding.
        y: (N, D) the label's embedding, None for a model without labels.
        plain: (N, T, D) the tokens before they were modulated, normalised.
        timestep: (N,) the time itself, 0..1000, on which random choices depend.
        steering: What a call tells the routers, `at` a block its own.
        routing: The decision, where it was made before: of a router that all layers share, or kept from another pass.
    """

    c: Tensor
    t: Tensor
    y: Tensor | None = None
    plain: Tensor | None = None
    timestep: Tensor | None = None
    steering: "Steering | None" = None
    routing: "Routing | None" = None

    def keys(self, salt: int) -> Tensor:
        """(N,) int64, of random numbers that are the image's own, others for every salt."""
        assert self.timestep is not None, "random choices depend on the time itself"
        return keys_of(self.timestep, salt)


class Router(nn.Module):
    """Logits of what it sees, z = [z_1 ... z_I], by one row of W = [W_1 ... W_I] an expert.

    * linear: z W^T.
    * mlp: tanh(z H^T + a) W^T + b, of `MLP_WIDTH` hidden units.
    * prototype: cosine_scale * cos(z, w_e), w_e being expert e's prototype: the length of neither counts. With the
      default scale it starts as a linear router does.
    * centroid: -|z - w_e|^2 / (2 (I D)^1/2), w_e being a centre of what a trained network's router would see; not
      trained. The nearest has the largest logit.

    What the inputs differ in decides who shares a decision: with "token" or "plain" (the token before modulation) each
    token has its own; with "position" alone a place, in every image and at every noise level; with "time" and "label"
    alone an image. Times and labels are normalised, so that every input has about unit variance.

    W starts with variance 1 / (I D), logits of about 1, and wants a learning rate of its own, D^-1/2 times that of the
    rest: Adam moves every weight by the same amount a step, and a router whose weights turn over in a few dozen steps
    hands tokens from expert to expert before any of them has learnt something.

    Args:
        hidden_size: Width D of a token.
        num_experts: Experts E, null experts included.
        kind: What logits are.
        inputs: What it looks at.
        positions: (T, D) one vector a place, of about unit variance, for the input "position".
        with_bias: Keep a balancing bias (see `losses.balanced_bias`) as the buffer `expert_bias`.
        cosine_scale: Of the kind prototype; None: (I D)^1/2.
        jitter: In training what it sees is multiplied by numbers in 1 - jitter .. 1 + jitter, an image's own.

    Source: prototypes: ProMoE (arXiv 2510.24711), which has cosine_scale 1; centroids: Moirai-MoE (arXiv 2410.10469);
    mlp: D2DMoE (arXiv 2310.04361); jitter: Switch Transformer (arXiv 2101.03961).

    Attributes:
        salt: What random choices depend on beside an image's time: the network gives each layer another.
    """

    expert_bias: Tensor | None
    positions: Tensor | None

    def __init__(
        self, hidden_size: int, num_experts: int, *, kind: Kind = "linear", inputs: Sequence[Input] = ("token",),
        positions: Tensor | None = None, with_bias: bool = False, cosine_scale: float | None = None,
        jitter: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        assert ("position" in inputs) == (positions is not None), "positions belong to the input position"
        self.hidden_size, self.kind, self.inputs = hidden_size, kind, tuple(inputs)
        self.cosine_scale = cosine_scale or (len(self.inputs) * hidden_size) ** 0.5
        self.jitter, self.salt = jitter, 0
        width, mlp = len(self.inputs) * hidden_size, kind == "mlp"
        self.hidden = nn.Linear(width, MLP_WIDTH) if mlp else None
        self.offset = nn.Parameter(torch.zeros(num_experts)) if mlp else None
        weight = torch.empty(num_experts, MLP_WIDTH if mlp else width)
        if kind == "centroid":
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("expert_bias", torch.zeros(num_experts) if with_bias else None)
        self.reset_parameters()

    @property
    def per_image(self) -> bool:
        """Whether images may differ in their decisions."""
        return self.inputs != ("position",)

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / (I D), of an mlp 1 / width in its second layer."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.offset is not None:
            nn.init.zeros_(self.offset)

    def forward(self, seen: Sequence[Tensor], keys: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `seen` gives -> logits (n, t, E) of its dtype, and the prototypes (E, I D), vectors of length 1, if any.

        n is N, or 1 where all images share a decision; t is T, or 1 where all tokens of an image do. `keys` (N,) are of
        the jitter.
        """
        with torch.autocast(seen[0].device.type, enabled=False):
            weight = self.weight.to(seen[0].dtype)
            if self.jitter and self.training:
                assert keys is not None, "jitter needs keys"
                seen = [z * self._jitter(keys, z, i) for i, z in enumerate(seen)]
            if self.kind == "linear":
                return self._products(seen, weight), None
            if self.hidden is not None and self.offset is not None:
                first, a, b = (p.to(weight.dtype) for p in (self.hidden.weight, self.hidden.bias, self.offset))
                return F.linear((self._products(seen, first) + a).tanh(), weight, b), None
            if self.kind == "centroid":
                squares = reduce(torch.add, (z.square().sum(dim=-1, keepdim=True) for z in seen))
                far = squares - 2 * self._products(seen, weight) + weight.square().sum(dim=1)
                return far / (-2 * weight.shape[1] ** 0.5), None
            prototypes = F.normalize(weight, dim=1)
            squares = reduce(torch.add, (z.square().sum(dim=-1, keepdim=True) for z in seen))  # of the length of z
            shrink = self.cosine_scale * squares.clamp_min(1e-12).rsqrt()
            return self._products(seen, prototypes) * shrink, prototypes

    def _jitter(self, keys: Tensor, z: Tensor, salt: int) -> Tensor:
        """Factors of z (n, t, D) of their shape, or 1 where images share z."""
        if len(z) != len(keys):
            return z.new_ones(())
        return 1 + self.jitter * (2 * uniform(keys, tuple(z.shape[1:]), salt).to(z.dtype) - 1)

    def _products(self, seen: Sequence[Tensor], weight: Tensor) -> Tensor:
        """z W^T (n, t, E), part by part: an input that many share is multiplied once."""
        parts = zip(seen, weight.split(self.hidden_size, dim=1), strict=True)
        return reduce(torch.add, (F.linear(z, w) for z, w in parts))

    def seen(self, x: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """The inputs of tokens x (N, T, D) of any float dtype: each (N or 1, T or 1, D), float32 or wider.

        Raises:
            ValueError: Another number of tokens than there are positions.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return [z.to(dtype) for z in self._seen(x, condition)]

    def _seen(self, x: Tensor, condition: Condition | None) -> Iterator[Tensor]:
        for kind in self.inputs:
            if kind == "token":
                yield x
            elif kind == "position":
                assert self.positions is not None
                if x.shape[1] != len(self.positions):
                    raise ValueError(
                        f"the router has positions for {len(self.positions)} tokens an image, got {x.shape[1]}"
                    )
                yield self.positions.unsqueeze(0)
            else:
                assert condition is not None, f"the router looks at {kind}"
                seen = {"plain": condition.plain, "time": condition.t, "label": condition.y}[kind]
                assert seen is not None, f"the router looks at {kind}, which is not there"
                yield seen if kind == "plain" else F.layer_norm(seen.float(), seen.shape[-1:]).unsqueeze(1)

"""The router: one logit for every decision and expert, in float32 whatever the model's precision.

Shapes: N images, T tokens of an image, D width, E experts, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Input = Literal["token", "plain", "time", "label", "position"]


class Condition(NamedTuple):
    """What there is beside the tokens that the experts get.

    Attributes:
        c: (N, D) what modulates a block: time and label together.
        t: (N, D) the time's embedding.
        y: (N, D) the label's embedding, None for a model without labels.
        plain: (N, T, D) the tokens before they were modulated, normalised.
    """

    c: Tensor
    t: Tensor
    y: Tensor | None = None
    plain: Tensor | None = None


class Router(nn.Module):
    """Linear router, logits = sum over its inputs of z_i W_i^T, with W = [W_1 ... W_I].

    What the inputs differ in decides who shares a decision: with "token" or "plain" (the token before modulation) each
    token has its own; with "position" alone a place, in every image and at every noise level; with "time" and "label"
    alone an image. Times and labels are normalised, so that every input has about unit variance.

    W starts with variance 1 / (I D), logits of about 1, and wants a learning rate of its own, D^-1/2 times that of the
    rest: Adam moves every weight by the same amount a step, and a router whose weights turn over in a few dozen steps
    hands tokens from expert to expert before any of them has learnt something.

    Args:
        hidden_size: Width D of a token.
        num_experts: Experts E.
        inputs: What it looks at.
        positions: (T, D) one vector a place, of about unit variance, for the input "position".
        with_bias: Keep a balancing bias (see `losses.balanced_bias`) as the buffer `expert_bias`.
    """

    expert_bias: Tensor | None
    positions: Tensor | None

    def __init__(
        self, hidden_size: int, num_experts: int, *, inputs: Sequence[Input] = ("token",),
        positions: Tensor | None = None, with_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        assert ("position" in inputs) == (positions is not None), "positions belong to the input position"
        self.hidden_size, self.inputs = hidden_size, tuple(inputs)
        self.weight = nn.Parameter(torch.empty(num_experts, len(self.inputs) * hidden_size))
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("expert_bias", torch.zeros(num_experts) if with_bias else None)
        self.reset_parameters()

    @property
    def per_image(self) -> bool:
        """Whether images may differ in their decisions."""
        return self.inputs != ("position",)

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / (I D)."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        """x (N, T, D), any float dtype -> logits (n, t, E) float32 (float64 stays float64).

        n is N, or 1 where all images share a decision; t is T, or 1 where all tokens of an image do.

        Raises:
            ValueError: Another number of tokens than there are positions.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            weights = self.weight.to(dtype).split(self.hidden_size, dim=1)
            parts = zip(self._seen(x, condition), weights, strict=True)
            return reduce(torch.add, (F.linear(z.to(dtype), w) for z, w in parts))

    def _seen(self, x: Tensor, condition: Condition | None) -> Iterator[Tensor]:
        """The inputs, each (n, t, D)."""
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

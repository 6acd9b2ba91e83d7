"""Factorised experts: any number of them at nearly the cost of one, as what differs between them are vectors.

Shapes: R rows with weights, B tokens that share a row's, D width, E experts, F hidden width, I inputs and O outputs of
a layer, C factors of it (its rank).
"""

import torch
from torch import Tensor, nn

from .kernels import Activation, _activate, autocast_dtype


class FactorisedLayer(nn.Module):
    """y = sum over the experts e of a_e W_e [x, 1], with W_e = output diag(expert_e) input.

    The sum is never carried out: y = ((a F_E) * ([x, 1] F_I)) F_O^T, where F_E (E, C), F_I (I + 1, C) and F_O (O, C)
    are the weights of `expert`, `input` (and its bias) and `output`.

    Source: muMoE (arXiv 2402.12550) eq. 2, the CP form.
    """

    def __init__(self, num_experts: int, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.expert = nn.Linear(num_experts, rank, bias=False)
        self.input = nn.Linear(inputs, rank)
        self.output = nn.Linear(rank, outputs, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """F_E ~ N(1, 1): all experts start near one layer; the others uniform in +-1 / sqrt(fan in), as in muMoE."""
        nn.init.normal_(self.expert.weight, mean=1.0)
        self.input.reset_parameters()
        self.output.reset_parameters()

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x (R, B, I), weights a (R, E) -> (R, B, O)."""
        y: Tensor = self.output(self.expert(a).unsqueeze(1) * self.input(x))
        return y


class FactorisedExperts(nn.Module):
    """Two such layers with the same weights, and the activation between them: all experts serve all tokens.

    There is no choice, so nothing is sorted, sent or balanced, and every expert learns of every token that gives it a
    weight above 0. Between the layers all experts share the hidden units: the output is no sum over experts.

    Args:
        hidden_size: Width D.
        num_experts: Experts E.
        width: Hidden width F.
        rank: Factors C of each layer.
        activation: As in FeedForward.

    Source: muMoE (arXiv 2402.12550) with its released code, which has gelu.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, width: int, rank: int, activation: Activation = "swiglu"
    ) -> None:
        super().__init__()
        self.num_experts, self.activation = num_experts, activation
        inner = 2 * width if activation == "swiglu" else width
        self.first = FactorisedLayer(num_experts, hidden_size, inner, rank)
        self.second = FactorisedLayer(num_experts, width, hidden_size, rank)

    def reset_parameters(self) -> None:
        """Both layers'."""
        self.first.reset_parameters()
        self.second.reset_parameters()

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x (R, B, D), weights a (R, E) -> (R, B, D), of x's dtype or autocast's."""
        x = x.to(autocast_dtype(x))
        a = a.to(x.dtype)
        y: Tensor = self.second(self.hidden(x, a), a)
        return y

    def hidden(self, x: Tensor, a: Tensor) -> Tensor:
        """(R, B, F), what all experts share."""
        return _activate(self.first(x, a), self.activation)

    @torch.no_grad()
    def norms(self, x: Tensor, a: Tensor) -> Tensor:
        """(E,) float64: of each expert the sum over tokens of |a_e W_e h|, its part of the second layer's sum."""
        a = a.to(x.dtype)
        inner, layer = self.second.input(self.hidden(x, a)), self.second  # (R, B, C)
        sizes = [layer.output(inner * f).double().norm(dim=-1).sum(dim=1) for f in layer.expert.weight.T]  # (R,) each
        return (torch.stack(sizes, dim=1) * a.double()).sum(dim=0)

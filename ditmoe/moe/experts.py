"""The experts: stacked feed-forward networks that carry out a plan, with two interchangeable kernels.

Shapes: S tokens laid flat, B rows that share a token's plan, D width, E experts, K experts per token, F hidden width
of an expert, P = S * K (token, expert) pairs sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .select import Plan

Activation = Literal["swiglu", "gelu"]
_LOOP_PAYS = 2**16  # D * F; on a CPU the loop won at 147,456 and 589,824, the grouped products at 16,384
_JOIN_PAYS = 2**20  # S * K * D * F: the matrices of all S places still fit in a cache


class FeedForward(nn.Module):
    """One dense feed-forward layer: the shared expert, and the blocks that hold no experts.

    Args:
        hidden_size: Width D.
        width: Hidden width F.
        activation: "swiglu": fc2(silu(a) * b) with (a, b) = fc1(x), no biases; "gelu": fc2(gelu_tanh(fc1(x))) with
            biases, which is DiT's.
    """

    def __init__(self, hidden_size: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        bias = activation == "gelu"
        self.fc1 = nn.Linear(hidden_size, _inner(width, activation), bias=bias)
        self.fc2 = nn.Linear(width, hidden_size, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, gate and up rows as two matrices: what the routed experts have."""
        bound = (6.0 / sum(self.fc2.weight.shape)) ** 0.5
        for linear in (self.fc1, self.fc2):
            nn.init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        y: Tensor = self.fc2(_activate(self.fc1(x), self.activation))
        return y


class Experts(nn.Module):
    """E feed-forward networks without biases, in two stacked weights.

    `w_in` is (E, 2F, D) for swiglu (gate rows first, then up rows) or (E, F, D) for gelu; `w_out` is (E, D, F).

    Args:
        hidden_size: Width D.
        num_experts: Experts E.
        width: Hidden width F.
        activation: As in FeedForward.
        backend: "grouped" (torch.nn.functional.grouped_mm: float32, bfloat16, float16; D and F multiples of 16
            bytes), "loop" (any dtype and size, one expert after the other), or "auto": grouped where it applies,
            but on a CPU the loop for experts of D * F >= 65,536, whose rows it keeps in cache. On a CPU both give
            the same bits (with gelu where F is a multiple of 64: torch rounds the ends of its runs differently).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        width: int,
        activation: Activation = "swiglu",
        backend: Literal["auto", "grouped", "loop"] = "auto",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.backend = backend
        # Under expert parallelism the weights are those of this process's experts, and this brings it their rows:
        # exchange(rows (P, D), counts (E,), products) -> (P, D).
        self.exchange: Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor] | None = None
        self.w_in = nn.Parameter(torch.empty(num_experts, _inner(width, activation), hidden_size))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        if backend == "grouped" and not _fits_grouped(hidden_size, width, torch.bfloat16):
            raise ValueError(
                f"backend grouped needs widths that are multiples of 8, got hidden_size {hidden_size} "
                f"and expert_width {width}; use backend loop or other widths"
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, each matrix of each expert by its own fan-in and fan-out, as DiT does for its MLP."""
        bound = (6.0 / sum(self.w_out.shape[1:])) ** 0.5
        nn.init.uniform_(self.w_in, -bound, bound)
        nn.init.uniform_(self.w_out, -bound, bound)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """The weighted sum of every token's experts: x (S, B, D) -> (S, B, D), of x's dtype or autocast's.

        B is 1 where every token has a plan of its own, and the number of images where the S places of an image
        decide for all of them.
        """
        x = x.to(autocast_dtype(x))
        if torch.compiler.is_compiling() and (self.exchange or x.dtype == torch.float32 or not self._use_grouped(x)):
            y: Tensor = self._uncompiled(x, plan)
            return y
        return self._weighted_sum(x, plan)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, x: Tensor, plan: Plan) -> Tensor:
        """Every step has other row counts, which would be compiled anew; and grouped_mm compiles in 16 bits only."""
        return self._weighted_sum(x, plan)

    def _weighted_sum(self, x: Tensor, plan: Plan) -> Tensor:
        y: Tensor
        if self.exchange is None and not self._use_grouped(x):
            w_in, w_out = self.w_in.to(x.dtype), self.w_out.to(x.dtype)
            y = _Loop.apply(x, w_in, w_out, plan.weight, plan.token, plan.slot, plan.counts, self.activation)
            return y
        S, B, D = x.shape
        counts = plan.counts * B
        rows = _Dispatch.apply(x.reshape(S, B * D), plan.token, plan.slot).view(-1, D)  # (P * B, D)
        exchange = self.exchange
        out = self._products(rows, counts) if exchange is None else exchange(rows, counts, self._products)
        y = _Combine.apply(out.view(-1, B * D), plan.weight, plan.token, plan.slot)
        return y.view(S, B, D)

    def _products(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Both products and the activation, for rows (P, D) sorted by expert: (P, D)."""
        w_in, w_out = self.w_in.to(rows.dtype), self.w_out.to(rows.dtype)
        if self._use_grouped(rows):
            hidden = _activate(_grouped(rows, w_in, counts), self.activation)  # (P, F)
            return _grouped(hidden, w_out, counts)
        parts = zip(rows.split(counts.tolist()), w_in.unbind(0), w_out.unbind(0), strict=True)
        return torch.cat([_activate(part @ a.T, self.activation) @ b.T for part, a, b in parts])

    def joins(self, places: int, top_k: int) -> bool:
        """Whether `joined` pays for an image of so many places: never where a backend was asked for by name."""
        return self.backend == "auto" and self.exchange is None and places * top_k * self.w_out[0].numel() <= _JOIN_PAYS

    def joined(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """`forward` where all B rows of a place have the same experts: they make up one dense layer of width K * F.

        The weighted sum happens inside the second product, without sorting, gathering or combining rows.

        Args:
            x: (S, B, D), S places of B images.
            expert_ids: (S, K) int64.
            weights: (S, K) float32.

        Returns:
            (S, B, D) of x's dtype or autocast's.
        """
        S, K = expert_ids.shape
        D, width = self.w_out.shape[1:]
        dtype = autocast_dtype(x)
        w_in = F.embedding(expert_ids, self.w_in.to(dtype).flatten(1)).view(S, K, -1, width, D)
        w_in = w_in.transpose(1, 2).reshape(S, -1, D)  # gate rows of all K, then up rows of all K
        w_out = F.embedding(expert_ids, self.w_out.to(dtype).flatten(1)).view(S, K, D, width)
        w_out = (w_out * weights[..., None, None].to(dtype)).transpose(1, 2).reshape(S, D, -1)
        hidden = _activate(torch.bmm(x.to(dtype), w_in.transpose(1, 2)), self.activation)  # (S, B, K * F)
        return torch.bmm(hidden, w_out.transpose(1, 2))

    def _use_grouped(self, x: Tensor) -> bool:
        if self.backend != "auto":
            return self.backend == "grouped"
        D, width = self.w_out.shape[1:]
        fits = _fits_grouped(D, width, x.dtype)
        return fits and (x.device.type != "cpu" or D * width < _LOOP_PAYS)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype, or else x's: grouped_mm does not know autocast, so casts are made by hand."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _inner(width: int, activation: Activation) -> int:
    return 2 * width if activation == "swiglu" else width


def _activate(h: Tensor, activation: Activation) -> Tensor:
    """The activation, with a gradient of our own for swiglu, but not where torch's compiler makes one."""
    if activation == "gelu" or torch.compiler.is_compiling():
        return _activation(h, activation)
    y: Tensor = _SwiGLU.apply(h)
    return y


def _fits_grouped(hidden_size: int, width: int, dtype: torch.dtype) -> bool:
    step = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}.get(dtype)
    return step is not None and hidden_size % step == 0 and width % step == 0


def _grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each expert's rows times its matrix: rows (P, I), weight (E, O, I) -> (P, O)."""
    offsets = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)


class _Loop(torch.autograd.Function):
    """Gather, both products, activation and combine, one expert after the other.

    What is as long as all pairs together is touched once; the rest has an expert's rows and stays in cache. The
    rows are gathered again for the backward pass, where the sums over a token's experts have a fixed order too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, weight: Tensor, token: Tensor, slot: Tensor, counts: Tensor,
        activation: Activation,
    ) -> Tensor:  # fmt: skip
        S, B, D = x.shape
        x = x.reshape(S, B * D)
        out = x.new_empty(len(token), B * D)
        hidden = []
        runs = _runs(counts)
        for e, run in runs:
            h = x.index_select(0, token[run]).view(-1, D) @ w_in[e].T
            torch.mm(_activation(h, activation), w_out[e].T, out=out[run].view(-1, D))
            hidden.append(h)
        ctx.save_for_backward(x, w_in, w_out, weight, token, slot, out, *hidden)
        ctx.runs, ctx.activation = runs, activation
        y = F.embedding_bag(slot, out, mode="sum", per_sample_weights=weight.to(out.dtype)[slot])
        return y.view(S, B, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, weight, token, slot, out, *hidden = ctx.saved_tensors
        shape, D = grad.shape, grad.shape[-1]
        grad = grad.reshape(x.shape)
        grad_rows, grad_weight = torch.empty_like(out), torch.empty_like(weight)
        grad_in, grad_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
        for (e, run), h in zip(ctx.runs, hidden, strict=True):
            g = grad.index_select(0, token[run])
            torch.sum(g.to(weight.dtype) * out[run].to(weight.dtype), dim=-1, out=grad_weight[run])
            g = (g * weight[run].to(g.dtype).unsqueeze(-1)).view(-1, D)
            torch.mm(g.T, _activation(h, ctx.activation), out=grad_out[e])
            grad_h = torch.empty_like(h)
            _activation_backward(g @ w_out[e], h, ctx.activation, grad_h)
            torch.mm(grad_h.T, x.index_select(0, token[run]).view(-1, D), out=grad_in[e])
            torch.mm(grad_h, w_in[e], out=grad_rows[run].view(-1, D))
        grad_x = F.embedding_bag(slot, grad_rows, mode="sum").view(shape)
        return grad_x, grad_in, grad_out, grad_weight, None, None, None, None


def _runs(counts: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    ends = counts.cumsum(0).tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise([0, *ends])) if end > start]


def _activation(h: Tensor, activation: Activation) -> Tensor:
    """Its values."""
    if activation == "gelu":
        return F.gelu(h, approximate="tanh")
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up if torch.compiler.is_compiling() else F.silu(gate).mul_(up)


def _activation_backward(grad: Tensor, h: Tensor, activation: Activation, out: Tensor) -> None:
    """The gradient of h, into `out`."""
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(grad, h, approximate="tanh", grad_input=out)
        return
    gate, up = h.chunk(2, dim=-1)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of h = [gate, up]. The gradient is written into one buffer, where autograd would join two."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return _activation(h, "swiglu")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        h2, grad2 = h.flatten(0, -2), grad.reshape(-1, grad.shape[-1])
        total = torch.empty_like(h2)
        for rows in _blocks(h2):
            _activation_backward(grad2[rows], h2[rows], "swiglu", total[rows])
        return total.view_as(h)


class _Dispatch(torch.autograd.Function):
    """rows[p] = x[token[p]]. The gradient is gathered through `slot` and summed in a fixed order: no atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return F.embedding_bag(slot, grad, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """y[s] = sum_k weight[slot[s, k]] * out[slot[s, k]]: an inverse gather in a fixed order.

    Products and sums are float32; the weights are first rounded to out's dtype, like every operand of a 16-bit product.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(out, weight, token)
        weights = weight.to(out.dtype)[slot]  # (S, K)
        return F.embedding_bag(slot, out, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        out, weight, token = ctx.saved_tensors
        grad_out, grad_weight = torch.empty_like(out), torch.empty_like(weight)
        factor = weight.to(out.dtype).unsqueeze(-1)
        for rows in _blocks(out):
            part = grad.index_select(0, token[rows])
            torch.sum(part.to(weight.dtype) * out[rows].to(weight.dtype), dim=-1, out=grad_weight[rows])
            torch.mul(part, factor[rows], out=grad_out[rows])
        return grad_out, grad_weight, None, None


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of x's rows: small enough for a core's cache on a CPU, all rows at once elsewhere."""
    size = max(1, 2**19 // x.shape[1]) if x.device.type == "cpu" else len(x)
    return (slice(start, start + size) for start in range(0, len(x), max(1, size)))

"""Kernels of the experts: gather, products, activation, combine, and their gradients.

A plan's way: `row` (P,) of each pair, `slot` (P,) where the pairs stand row after row, `starts` (R,) of the rows in it.

Shapes: R rows with a plan, B tokens that share a row's, D width, E experts, F hidden width of an expert, P
(row, expert) pairs sorted by expert.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Literal["swiglu", "gelu"]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype, or else x's: grouped_mm does not know autocast, so casts are made by hand."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _activate(h: Tensor, activation: Activation) -> Tensor:
    """The activation, with a gradient of our own for swiglu, but not where torch's compiler makes one."""
    if activation == "gelu" or torch.compiler.is_compiling():
        return _activation(h, activation)
    y: Tensor = _SwiGLU.apply(h)
    return y


def _grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each expert's rows times its matrix: rows (P, I), weight (E, O, I) -> (P, O)."""
    offsets = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)


def _one_by_one(rows: Tensor, counts: Tensor, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
    """compute(e, its rows) of every expert of rows (P, I), one below the other, and zeros behind them: (P, O)."""
    sizes = counts.tolist()
    out = torch.cat([compute(e, part) for e, part in enumerate(rows[: sum(sizes)].split(sizes))])
    return out if len(out) == len(rows) else F.pad(out, (0, 0, 0, len(rows) - len(out)))


class _Loop(torch.autograd.Function):
    """Gather, both products, activation and combine, one expert after the other.

    What is as long as all pairs together is touched once; the rest has an expert's rows and stays in cache. The
    rows are gathered again for the backward pass, where the sums over a token's experts have a fixed order too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, weight: Tensor, row: Tensor, slot: Tensor, starts: Tensor,
        counts: Tensor, activation: Activation, keep: bool,
    ) -> Tensor:  # fmt: skip
        R, B, D = x.shape
        out = x.new_empty(len(row), B * D)
        hidden = []
        runs = _runs(counts)
        for e, run in runs:
            h = x.index_select(0, row[run]).view(-1, D) @ w_in[e].T
            torch.mm(_activation(h, activation), w_out[e].T, out=out[run].view(-1, D))
            hidden += [h] if keep else []
        ctx.save_for_backward(x, w_in, w_out, weight, row, slot, starts, out, *hidden)
        ctx.runs, ctx.activation = runs, activation
        return _bags(out, slot, starts, weight).view(R, B, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, weight, row, slot, starts, out, *hidden = ctx.saved_tensors
        shape, D = grad.shape, grad.shape[-1]
        grad_rows, grad_weight = torch.empty_like(out), torch.empty_like(weight)
        needed = zip((w_in, w_out), ctx.needs_input_grad[1:3], strict=True)  # not those of a frozen network
        grad_in, grad_out = (torch.zeros_like(w) if need else None for w, need in needed)
        for (e, run), h in zip(ctx.runs, hidden, strict=True):
            g = grad.index_select(0, row[run]).flatten(1)
            torch.sum(g.to(weight.dtype) * out[run].to(weight.dtype), dim=-1, out=grad_weight[run])
            g = (g * weight[run].to(g.dtype).unsqueeze(-1)).view(-1, D)
            if grad_out is not None:
                torch.mm(g.T, _activation(h, ctx.activation), out=grad_out[e])
            grad_h = torch.empty_like(h)
            _activation_backward(g @ w_out[e], h, ctx.activation, grad_h)
            if grad_in is not None:
                torch.mm(grad_h.T, x.index_select(0, row[run]).view(-1, D), out=grad_in[e])
            torch.mm(grad_h, w_in[e], out=grad_rows[run].view(-1, D))
        grad_x = _bags(grad_rows, slot, starts).view(shape)
        return grad_x, grad_in, grad_out, grad_weight, None, None, None, None, None, None


def _bags(pairs: Tensor, slot: Tensor, starts: Tensor, weight: Tensor | None = None) -> Tensor:
    """The (weighted) sum of every row's pairs: pairs (P, X) in the plan's order -> (R, X), in a fixed order."""
    scale = None if weight is None else weight.to(pairs.dtype)[slot]
    return F.embedding_bag(slot, pairs, starts, mode="sum", per_sample_weights=scale)


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
    """pairs[p] = x[row[p]]. The gradient is gathered through `slot` and summed in a fixed order: no atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, slot: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(slot, starts)
        return x.index_select(0, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _bags(grad, *ctx.saved_tensors), None, None, None


class _Combine(torch.autograd.Function):
    """y[r] = sum over the pairs p of row r of weight[p] * out[p]: an inverse gather in a fixed order.

    Products and sums are float32; the weights are first rounded to out's dtype, like every operand of a 16-bit product.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, row: Tensor, slot: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(out, weight, row)
        return _bags(out, slot, starts, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, weight, row = ctx.saved_tensors
        grad_out, grad_weight = torch.empty_like(out), torch.empty_like(weight)
        factor = weight.to(out.dtype).unsqueeze(-1)
        for some in _blocks(out):
            part = grad.index_select(0, row[some])
            torch.sum(part.to(weight.dtype) * out[some].to(weight.dtype), dim=-1, out=grad_weight[some])
            torch.mul(part, factor[some], out=grad_out[some])
        return grad_out, grad_weight, None, None, None


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of x's rows: small enough for a core's cache on a CPU, all rows at once elsewhere."""
    size = max(1, 2**19 // x.shape[1]) if x.device.type == "cpu" else len(x)
    return (slice(start, start + size) for start in range(0, len(x), max(1, size)))

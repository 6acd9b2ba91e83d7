"""Tokens to the processes that hold their experts, and the results back; sums over all processes.

Shapes: P (token, expert) pairs sorted by expert, E experts, D width.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Exchange:
    """Sends rows around a `group`: the processes among which a layer's experts are split, in order of their slices."""

    def __init__(self, group: Any) -> None:
        self.group, self.degree = group, dist.get_world_size(group)
        self.bytes_sent = 0  # to other processes, forward and backward, since the start

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __call__(self, rows: Tensor, counts: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The experts' outputs (P, D) for rows (P, D); counts (E,) int64 are those of all experts.

        `compute` takes the rows of this process's experts, sorted by expert, and their counts (E / degree,).
        """
        there = counts.view(self.degree, -1)  # (degree, E / degree)
        here = torch.empty_like(there)
        dist.all_to_all_single(here, there.contiguous(), group=self.group)
        send, receive = there.sum(1).tolist(), here.sum(1).tolist()  # the one host synchronisation of a layer
        got = _AllToAll.apply(rows, receive, send, self)  # by process, then by expert
        local = torch.arange(here.shape[1], device=rows.device).repeat(self.degree).repeat_interleave(here.flatten())
        order = local.argsort(stable=True)
        out = compute(got.index_select(0, order), here.sum(0)).index_select(0, order.argsort())
        result: Tensor = _AllToAll.apply(out, send, receive, self)
        return result


class _AllToAll(torch.autograd.Function):
    """Rows to other processes; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int], exchange: Exchange) -> Tensor:
        ctx.sizes, ctx.exchange = (send, receive), exchange
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=exchange.group)
        exchange.bytes_sent += (len(rows) - send[dist.get_rank(exchange.group)]) * rows[:1].nbytes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        receive, send = ctx.sizes
        return _AllToAll.apply(grad, receive, send, ctx.exchange), None, None, None


def all_sum(value: Tensor) -> Tensor:
    """The sum of all processes' values, whose gradient is the sum of all their gradients. All must call it.

    So a loss of global statistics, which every process calculates whole, has the gradient of one process once
    parameters' gradients are averaged over processes.
    """
    total: Tensor = _AllSum.apply(value) if dist.is_initialized() and dist.get_world_size() > 1 else value
    return total


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _AllSum.apply(grad)
        return total


def local(value: Tensor) -> Tensor:
    """This process's slice of a sharded tensor, itself of any other."""
    mine: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return mine

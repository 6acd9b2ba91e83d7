"""Expert parallelism: the experts of every layer are split over processes, everything else is replicated.

The processes form a mesh (data, expert). The `degree` processes of a row hold E / degree experts each, and send each
other the tokens that those experts serve (two all-to-all exchanges a layer and pass); every process trains on images
of its own. Source of the rules for gradients: Megatron-LM's distributed data parallel, checked in tests/faults.

Shapes: P (token, expert) pairs sorted by expert, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .moe import Experts

Compute = Callable[[Tensor, Tensor], Tensor]


class Exchange:
    """Sends rows to the processes that hold their experts, and the results back.

    Args:
        group: The processes among which a layer's experts are split, in the order of their slices.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.degree = dist.get_world_size(group)
        self.bytes_sent = 0  # to other processes, forward and backward, since the start

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self

    def __call__(self, rows: Tensor, counts: Tensor, compute: Compute) -> Tensor:
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
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        out = compute(got.index_select(0, order), here.sum(0)).index_select(0, back)
        result: Tensor = _AllToAll.apply(out, send, receive, self)
        return result


class _AllToAll(torch.autograd.Function):
    """Rows to other processes; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int], exchange: Exchange) -> Tensor:
        ctx.sizes, ctx.exchange = (send, receive), exchange
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=exchange.group)
        own = send[dist.get_rank(exchange.group)]
        exchange.bytes_sent += (len(rows) - own) * rows[:1].nbytes if len(rows) else 0
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        receive, send = ctx.sizes
        return _AllToAll.apply(grad, receive, send, ctx.exchange), None, None, None


class ExpertParallel:
    """Which experts this process holds, and what follows from it. With degree 1 everything is as without it.

    Args:
        accelerator: All processes.
        degree: Processes that share the experts of a layer.
        num_experts: Experts E of a layer.

    Raises:
        ValueError: The degree does not divide the processes or the experts.
    """

    def __init__(self, accelerator: Accelerator, degree: int, num_experts: int) -> None:
        self.accelerator, self.degree = accelerator, degree
        self.world = accelerator.num_processes
        if self.world % degree:
            raise ValueError(
                f"parallel.experts is {degree}, but the launch has {self.world} process(es); start a multiple of "
                f"{degree}, as in: torchrun --nproc-per-node {degree} train.py ..."
            )
        if num_experts % degree:
            raise ValueError(f"parallel.experts {degree} does not divide moe.num_experts {num_experts}")
        self.shard = accelerator.process_index % degree  # which slice of the experts
        self.replica = accelerator.process_index // degree  # which copy of it
        self._exchange: Exchange | None = None
        self._data: Any = None
        if degree > 1:
            device = accelerator.device.type
            mesh = init_device_mesh(device, (self.world // degree, degree), mesh_dim_names=("data", "expert"))
            self._exchange = Exchange(mesh["expert"].get_group())
            self._data = mesh["data"].get_group()

    @property
    def bytes_sent(self) -> int:
        """To other processes by all exchanges so far."""
        return self._exchange.bytes_sent if self._exchange else 0

    def split(self, model: nn.Module) -> None:
        """Keep this process's slice of all experts of a model that is the same on every process."""
        if self._exchange is None:
            return
        for module in model.modules():
            if isinstance(module, Experts):
                module.exchange = self._exchange
                module.w_in = nn.Parameter(self.slice(module.w_in.detach()).clone())
                module.w_out = nn.Parameter(self.slice(module.w_out.detach()).clone())
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(expert_names(model)))

    def slice(self, value: Tensor) -> Tensor:
        """This process's experts of (E, ...)."""
        size = len(value) // self.degree
        return value[self.shard * size : (self.shard + 1) * size]

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Finish the gradients of one step, clip them by their global norm, and return that norm.

        The exchanges' backward passes have summed the experts' gradients over a row of the mesh; the others are means
        over all processes. So the experts' are summed over the rows too, and divided by the number of processes.
        """
        if self._exchange is None:
            norm: Tensor = self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
            return norm
        names = expert_names(model)
        split = [p.grad for n, p in model.named_parameters() if n in names and p.grad is not None]
        whole = [p.grad for n, p in model.named_parameters() if n not in names and p.grad is not None]
        for grad in split:
            dist.all_reduce(grad, group=self._data)
            grad.div_(self.world)
        squares = torch.stack([_square(split), _square(whole)])
        dist.all_reduce(squares[:1], group=self._exchange.group)
        norm = squares.sum().sqrt()
        torch._foreach_mul_(split + whole, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gathered(self, value: Tensor) -> Tensor | None:
        """The whole (E, ...) tensor of a slice, on the CPU of the first process; None elsewhere. All must call it."""
        if self._exchange is None:
            return value.detach().cpu()
        parts = [torch.empty_like(value) for _ in range(self.degree)]
        dist.all_gather(parts, value.detach().contiguous(), group=self._exchange.group)
        return torch.cat([part.cpu() for part in parts]) if self.accelerator.is_main_process else None

    def own(self, parts: Mapping[str, Mapping[str, Tensor]], names: set[str]) -> dict[str, dict[str, Tensor]]:
        """Of a checkpoint's whole tensors those slices that this process holds."""
        return {
            part: {key: self.slice(v) if v.ndim and _parameter(key, part) in names else v for key, v in tensors.items()}
            for part, tensors in parts.items()
        }

    def saved(
        self, parts: Mapping[str, Mapping[str, Tensor]], names: set[str]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        """What is the same on every process, and slices of experts: the first process saves the one, all the other."""
        if self._exchange is None:
            return {part: dict(tensors) for part, tensors in parts.items()}, {}
        split = {
            part: {key for key, value in tensors.items() if value.ndim and _parameter(key, part) in names}
            for part, tensors in parts.items()
        }
        whole = {part: {k: v for k, v in tensors.items() if k not in split[part]} for part, tensors in parts.items()}
        return whole, {part: {k: tensors[k] for k in sorted(split[part])} for part, tensors in parts.items()}


def expert_names(model: nn.Module) -> set[str]:
    """Names of the parameters that expert parallelism splits."""
    return {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for weight in ("w_in", "w_out")
    }


def _parameter(key: str, part: str) -> str:
    """The parameter that a checkpoint's tensor belongs to: moments are named after it."""
    return key.rsplit(".", 1)[0] if part == "optimizer" else key


def _square(grads: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(grads)).square().sum()

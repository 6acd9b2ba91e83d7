"""How a model is split over processes: its experts (expert parallelism), and all the rest (FSDP2's sharding).

Expert parallelism: the processes form a mesh (data, expert). The `degree` processes of a row hold E / degree experts
each, and send each other the tokens that those experts serve (two all-to-all exchanges a layer and pass); every process
trains on images of its own. The rest is replicated (DDP), or with `sharded` every process holds a slice of each
parameter along its first dimension, gathered block by block when it is needed (torch's `fully_shard`).
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ..config.sections import ParallelConfig
from ..model import DiTMoETransformer2DModel as Model
from ..moe import Experts, Router
from ..run_folder.checkpoint import Saved
from .exchange import Exchange, local

Parts = dict[str, dict[str, Tensor]]


class Parallel:
    """Which part of a model with `num_experts` a layer this process holds, and what follows. By itself all of it.

    Raises:
        ValueError: The degree does not divide the processes or the experts; sharding over one process.
    """

    def __init__(self, accelerator: Accelerator, config: ParallelConfig, num_experts: int) -> None:
        degree, world = config.experts, accelerator.num_processes
        if world % degree:
            start = f"start a multiple of {degree}, as in: torchrun --nproc-per-node {degree} train.py ..."
            raise ValueError(f"parallel.experts is {degree}, but the launch has {world} process(es); {start}")
        if num_experts % degree:
            raise ValueError(f"parallel.experts {degree} does not divide moe.num_experts {num_experts}")
        if config.shard and world == 1:
            raise ValueError("parallel.shard needs several processes: torchrun --nproc-per-node N train.py ...")
        if config.gather == "bfloat16" and accelerator.mixed_precision != "bf16":
            raise ValueError("parallel.gather bfloat16 needs --train.precision bf16, which this run does not have")
        self.accelerator, self.degree, self.sharded, self.world = accelerator, degree, config.shard, world
        self.rank, device = accelerator.process_index, accelerator.device.type
        self.splits = config.shard or degree > 1  # a process holds a part of the model only
        self.writers = world if config.shard else degree  # the first so many processes write checkpoints
        self.experts: set[str] = set()  # names of the parameters that `split` has split by experts
        self._sliced: set[str] = set()  # those, and the ones that have a slice on every process
        self._exchange: Exchange | None = None
        self._data: Any = None
        if degree > 1:
            mesh = init_device_mesh(device, (world // degree, degree), mesh_dim_names=("data", "expert"))
            self._exchange, self._data = Exchange(mesh["expert"].get_group()), mesh["data"].get_group()
        self._mesh: DeviceMesh | None = init_device_mesh(device, (world,)) if config.shard else None
        self._policy = MixedPrecisionPolicy()
        if config.gather == "bfloat16":
            self._policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    @property
    def bytes_sent(self) -> int:
        """To other processes by all exchanges of tokens so far."""
        return self._exchange.bytes_sent if self._exchange else 0

    @torch.no_grad()
    def split(self, make: Callable[[], Model]) -> tuple[Model, Model]:
        """Twice the network that `make` makes on the first process, of each what this process keeps, on its device.

        The first process alone ever has all of it, on its CPU, and sends one tensor after another.
        """
        whole = dict(_tensors(make())) if self.rank == 0 else {}
        with torch.device("meta"):
            model = make()
        shapes = {name: value.shape for name, value in _tensors(model)}
        self._split_experts(model)
        twin = copy.deepcopy(model)
        for net in (model, twin):
            self._shard_rest(net)
            net.to_empty(device=self.accelerator.device)
        self._sliced = self.experts | {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
        other = dict(_tensors(twin))
        for name, value in _tensors(model):
            sent = torch.empty(shapes[name], dtype=value.dtype, device=self.accelerator.device)
            if self.rank == 0:
                sent.copy_(whole.pop(name))
            dist.broadcast(sent, 0)
            if name in self._sliced:
                sent = sent[slice(*self._bounds(name, len(sent)))]
            for target in (value, other[name]):
                local(target.detach()).copy_(sent)
        return model, twin

    def _split_experts(self, model: nn.Module) -> None:
        """Keep this process's slice of all experts."""
        if self._exchange is None:
            return
        for module in model.modules():
            if isinstance(module, Experts):
                module.exchange = self._exchange
                module.w_in = nn.Parameter(module.w_in.detach().chunk(self.degree)[0])  # meta: only the shape counts
                module.w_out = nn.Parameter(module.w_out.detach().chunk(self.degree)[0])
        self.experts = expert_names(model)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(self.experts))

    def _shard_rest(self, model: Model) -> None:
        """Keep this process's slice of every parameter that is not a split expert's, along its first dimension."""
        if self._mesh is None:
            return
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # that nothing writes into
        left_out = {p for name, p in model.named_parameters() if name in self.experts}
        for module in model.modules() if self._policy.param_dtype else ():
            if isinstance(module, Router):  # a group of its own: its weights are never rounded
                fully_shard(module, mesh=self._mesh)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=self._mesh, mp_policy=self._policy, ignored_params=left_out)

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Finish the gradients of one step, clip them by their global norm, and return that norm.

        The exchanges' backward passes have summed the experts' gradients over a row of the mesh; the others are means
        over all processes. So the experts' are summed over the rows too, and divided by the number of processes
        (the rule of Megatron-LM's distributed data parallel).
        """
        if not self.splits:
            norm: Tensor = self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
            return norm
        grads = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        experts = [grad for name, grad in grads.items() if name in self.experts]
        others = [grad for name, grad in grads.items() if name not in self.experts]
        for grad in experts:
            dist.all_reduce(grad, group=self._data)
            grad.div_(self.world)
        squares = [_square(found, self.accelerator.device) for found in (experts, others)]
        if self._exchange:
            dist.all_reduce(squares[0], group=self._exchange.group)
        if self.sharded:
            dist.all_reduce(squares[1])
        norm = torch.stack(squares).sum().sqrt()
        torch._foreach_mul_([*grads.values()], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gathered(self, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of some parameters, on the CPU of the first process; none elsewhere. All must call it."""
        found = {}
        for name, value in slices.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if name in self.experts and self._exchange:
                parts = [torch.empty_like(value) for _ in range(self.degree)]
                dist.all_gather(parts, value.contiguous(), group=self._exchange.group)
                whole = torch.cat(parts)
            if self.rank == 0:
                found[name] = whole.cpu()
        return found

    def own(self, parts: Mapping[str, Mapping[str, Saved]]) -> Parts:
        """Of a checkpoint's tensors what this process holds, as the parameters are held; nothing else is read."""

        def mine(name: str, value: Saved) -> Tensor:
            if not value.shape or name not in self._sliced:
                return value.whole()
            rows = value.rows(*self._bounds(name, value.shape[0]))
            if name in self.experts:
                return rows
            stride, rows = torch.empty(value.shape, device="meta").stride(), rows.to(self.accelerator.device)
            return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=value.shape, stride=stride)

        return {part: {k: mine(_parameter(k, part), v) for k, v in found.items()} for part, found in parts.items()}

    def saved(self, parts: Parts) -> tuple[Parts, Parts]:
        """What the first process saves of the state, and the slices that this one saves."""
        whole: Parts = {part: {} for part in parts}
        split: Parts = {part: {} for part in parts} if self.splits else {}
        for part, tensors in parts.items():
            for key, value in tensors.items():
                if not value.ndim or _parameter(key, part) not in self._sliced:
                    whole[part][key] = value
                elif isinstance(value, DTensor) or self.rank < self.degree:  # of the experts the first copy
                    split[part][key] = local(value)
        return ({} if self.rank else whole), split

    def _bounds(self, name: str, rows: int) -> tuple[int, int]:
        """A parameter's rows that are this process's, cut as torch does: the last slices may be short, or empty."""
        slices = self.degree if name in self.experts else self.world
        size, position = -(-rows // slices), self.rank % slices
        return position * size, (position + 1) * size


def expert_names(model: nn.Module) -> set[str]:
    """Names of the parameters that expert parallelism splits."""
    layers = [path for path, module in model.named_modules() if isinstance(module, Experts)]
    return {f"{path}.{weight}" for path in layers for weight in ("w_in", "w_out")}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, also those that are never saved."""
    yield from model.named_parameters()
    yield from model.named_buffers(remove_duplicate=False)


def _parameter(key: str, part: str) -> str:
    """The parameter that a checkpoint's tensor belongs to: moments are named after it."""
    return key.rsplit(".", 1)[0] if part == "optimizer" else key


def _square(grads: list[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(grads)).square().sum()

"""Experts on the disk, of which a few are in memory.

Shapes: R rows with a plan, B tokens that share a row's, D width, E experts, F hidden width of an expert, P
(row, expert) pairs sorted by expert.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.experts import Experts, evened, unscaled
from ..moe.kernels import _activation, _bags, _runs, autocast_dtype
from ..moe.select import Plan
from .slices import Place

Read = Callable[[int, tuple[Tensor, ...]], None]  # expert, and where its matrices go


class StoredExperts(nn.Module):
    """What `Experts` computes, to the bit as its loop does, with room for `cached` of them in memory.

    Those that are there are served first, the others while the next ones are read; what makes room is what was not
    asked for the longest time. From one sampling step to the next most tokens choose alike.

    Args:
        like: The experts, on the meta device.
        read: Fills the matrices of an expert, as stored: w_in, w_out, of int8 their scales too.
        stored: How the stacked ones are stored.
        cached: Experts that have room, 1 to E.
        reader: Runs what is read beside the products, one after the other.

    Attributes:
        asked: Experts that were needed, over all passes; `waited`: of them those that were not in memory nor on the way
            when their turn came; `absent`: that were not in memory when the pass began.
    """

    def __init__(self, like: Experts, read: Read, stored: Sequence[Place], cached: int, reader: Executor) -> None:
        super().__init__()
        self.num_experts, self.activation, self.biases = like.num_experts, like.activation, like.biases
        self._read, self._reader = read, reader
        self._room = [
            tuple(torch.empty(place.shape[1:], dtype=place.dtype) for place in stored)
            for _ in range(min(cached, like.num_experts))
        ]
        self._free = [*range(len(self._room))]
        self._place: dict[int, int] = {}  # of an expert in `_room`, the last that was asked for at the end
        self._coming: dict[int, Future[None]] = {}
        self.asked = self.absent = self.waited = 0

    def _save_to_state_dict(self, *_: object) -> None:
        raise ValueError("experts that stay on the disk are not saved again; copy their folder")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """The weighted sum of every row's experts: x (R, B, D) -> (R, B, D)."""
        assert not torch.is_grad_enabled(), "stored experts are not trained"
        x = x.to(autocast_dtype(x))
        if not x.numel():
            return x
        R, B, D = x.shape
        plan = evened(plan, x)
        x = x.reshape(R, B * D)
        out = x.new_empty(len(plan.row), B * D)
        runs = dict(_runs(plan.counts))
        for e in self._in_turn([*runs]):
            w_in, w_out, *scales = (w.to(x.device) for w in self._room[self._place[e]])
            in_scale, out_scale = scales or (None, None)
            w_in, w_out = unscaled(w_in, in_scale, x.dtype), unscaled(w_out, out_scale, x.dtype)
            rows = x.index_select(0, plan.row[runs[e]]).view(-1, D)
            rows = F.pad(rows, (0, 8), value=1 / 8) if self.biases else rows
            torch.mm(_activation(rows @ w_in.T, self.activation), w_out.T, out=out[runs[e]].view(-1, D))
        return _bags(out, plan.slot, plan.starts, plan.weight).view(R, B, D)

    def _in_turn(self, needed: list[int]) -> Iterator[int]:
        """The experts that are needed, each once it is in memory."""
        order = sorted(needed, key=lambda e: e not in self._place)
        self.asked += len(order)
        self.absent += sum(e not in self._place for e in order)
        for number, e in enumerate(order):
            self.waited += e not in self._place
            self._begin(order[number:])
            try:
                if (coming := self._coming.pop(e, None)) is not None:
                    coming.result()
            except BaseException:
                self._forget(e, *self._coming)
                raise
            self._place[e] = self._place.pop(e)
            yield e

    def _begin(self, needed: list[int]) -> None:
        """Have those that are not there read, as many as there is room for that none of the needed has."""
        waiting = [e for e in needed if e not in self._place]
        others = [e for e in self._place if e not in needed]
        for e in waiting[: len(self._free) + len(others)]:
            place = self._free.pop() if self._free else self._place.pop(others.pop(0))
            self._place[e] = place
            self._coming[e] = self._reader.submit(self._read, e, self._room[place])

    def _forget(self, *experts: int) -> None:
        """Give up the room of experts that may not have come whole."""
        wait(self._coming.values())
        self._coming.clear()
        self._free += [self._place.pop(e) for e in experts]

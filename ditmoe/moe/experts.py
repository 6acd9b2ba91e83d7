"""The experts: stacked feed-forward networks that carry out a plan, with two interchangeable kernels.

Shapes: R rows with a plan, B tokens that share a row's, D width, E experts, F hidden width of an expert, P
(row, expert) pairs sorted by expert; K experts of a row where all have as many.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Activation, _activate, _Combine, _Dispatch, _grouped, _Loop, _one_by_one, autocast_dtype
from .select import Plan


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
        y: Tensor = self.fc2(self.hidden(x))
        return y

    def hidden(self, x: Tensor) -> Tensor:
        """x (..., D) -> what the second matrix gets, (..., F)."""
        return _activate(self.fc1(x), self.activation)


class Experts(nn.Module):
    """E feed-forward networks in two stacked weights.

    `w_in` is (E, 2F, D) for swiglu (gate rows first, then up rows) or (E, F, D) for gelu; `w_out` is (E, D, F). With
    `biases` w_in is 8 wider: the weights of 8 constant inputs of 1/8, so that products keep their multiples of 8.

    Args:
        hidden_size: Width D.
        num_experts: Experts E.
        width: Hidden width F.
        activation: As in FeedForward.
        backend: "grouped" (torch.nn.functional.grouped_mm: float32, bfloat16, float16; D and F multiples of 16
            bytes), "loop" (any dtype and size, expert after expert, whose rows stay in cache), or "auto": grouped where
            it applies, but on a CPU the loop from 256 rows an expert on; if D * F < 65,536 from 512 with gradients and
            never in 16 bits. There both give the same bits (with gelu if F is a multiple of 64: torch rounds ends of
            runs differently).
        biases: Before the activation; an output bias is for the shared expert, which every token has.
        active_width: Width of the dense layer whose initial size the experts share, K F where K of them serve a token
            with weights that sum to K; default: F, each for itself.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, width: int, activation: Activation = "swiglu",
        backend: Literal["auto", "grouped", "loop"] = "auto", active_width: int | None = None, biases: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.activation, self.biases = num_experts, activation, biases
        self.backend = backend
        self.active_width = active_width or width
        # Under expert parallelism the weights are those of this process's experts, and this brings it their rows:
        # exchange(rows (P, D), counts (E,), products) -> (P, D).
        self.exchange: Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor] | None = None
        self.w_in = nn.Parameter(torch.empty(num_experts, _inner(width, activation), hidden_size + 8 * biases))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        check_backend(backend, hidden_size, width, f"hidden_size {hidden_size} and expert_width {width}")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, as DiT does for its MLP, by the fans of a dense layer of the active width.

        K experts of width F whose weights sum to K then are, at the start and to Adam, one dense layer of width K F
        (Complete-muE, arXiv 2605.23893; by their own fans they would start too loud).
        """
        bound = (6.0 / (self.active_width + self.w_out.shape[1])) ** 0.5
        nn.init.uniform_(self.w_in, -bound, bound)
        nn.init.zeros_(self.w_in[..., self.w_out.shape[1] :])
        nn.init.uniform_(self.w_out, -bound, bound)

    def store_int8(self) -> None:
        """From now on the weights are int8, with a float32 scale a row, `w_in_scale` (E, 2F, 1), `w_out_scale`."""
        for name in ("w_in", "w_out"):
            weight = getattr(self, name).detach().float()
            scale = weight.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
            setattr(self, name, nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False))
            self.register_buffer(f"{name}_scale", scale)

    def matrices(self, dtype: torch.dtype) -> list[Tensor]:
        """w_in and w_out, of that dtype."""
        scales = getattr(self, "w_in_scale", None), getattr(self, "w_out_scale", None)
        return [unscaled(w, scale, dtype) for w, scale in zip((self.w_in, self.w_out), scales, strict=True)]

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """The weighted sum of every row's experts: x (R, B, D) -> (R, B, D), of x's dtype or autocast's."""
        x = x.to(autocast_dtype(x))
        if not x.numel() and self.exchange is None:  # else the others wait for this process
            return x
        grouped = self._use_grouped(x, len(plan.row) * x.shape[1])
        if torch.compiler.is_compiling() and (self.exchange or x.dtype == torch.float32 or not grouped):
            y: Tensor = self._uncompiled(x, plan, grouped)
            return y
        return self._weighted_sum(x, plan, grouped)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, x: Tensor, plan: Plan, grouped: bool) -> Tensor:
        """Every step has other row counts, which would be compiled anew; and grouped_mm compiles in 16 bits only."""
        return self._weighted_sum(x, plan, grouped)

    def _weighted_sum(self, x: Tensor, plan: Plan, grouped: bool) -> Tensor:
        y: Tensor
        plan = plan if self.exchange else evened(plan, x)
        way = plan.row, plan.slot, plan.starts
        if self.exchange is None and not self.biases and not grouped:
            w_in, w_out = self.matrices(x.dtype)
            y = _Loop.apply(x, w_in, w_out, plan.weight, *way, plan.counts, self.activation, torch.is_grad_enabled())
            return y
        R, B, D = x.shape
        counts = plan.counts * B
        rows = _Dispatch.apply(x.reshape(R, B * D), *way).view(-1, D)
        exchange = self.exchange
        out = self._products(rows, counts, grouped) if exchange is None else exchange(rows, counts, self._products)
        y = _Combine.apply(out.view(-1, B * D), plan.weight, *way)
        return y.view(R, B, D)

    def _products(self, rows: Tensor, counts: Tensor, grouped: bool | None = None) -> Tensor:
        """Both products and the activation, for rows (P, D) sorted by expert: (P, D)."""
        w_in, w_out = self.matrices(rows.dtype)
        rows = F.pad(rows, (0, 8), value=1 / 8) if self.biases else rows
        if self._use_grouped(rows, len(rows)) if grouped is None else grouped:
            hidden = _activate(_grouped(rows, w_in, counts), self.activation)  # (P, F)
            return _grouped(hidden, w_out, counts)
        a, b = w_in.unbind(0), w_out.unbind(0)
        return _one_by_one(rows, counts, lambda e, part: _activate(part @ a[e].T, self.activation) @ b[e].T)

    def _use_grouped(self, x: Tensor, pairs: int) -> bool:
        if self.backend != "auto":
            return self.backend == "grouped"
        E, D, width = self.w_out.shape
        small = D * width < 2**16
        few = pairs < E * (512 if small and torch.is_grad_enabled() else 256) or (small and x.itemsize < 4)
        return _fits_grouped(D, width, x.dtype) and (few or x.device.type != "cpu")


def evened(plan: Plan, x: Tensor) -> Plan:
    """The plan for the kernels alone: each expert's pairs filled up to a multiple of 32, by copies that no slot has.

    x is (R, ..., D): rows that many tokens share have few numbers as it is, and stay.
    On a CPU a product of 16 bits is compiled anew for every number of rows, which takes ten times as long as it does
    (oneDNN). A copy is of the expert's last pair, with weight 0. The lists are 31 E longer whatever the counts are, for
    torch's compiler: nobody computes or reads what is behind the last expert's. `expert` stays as it was.
    """
    shared = x.numel() > len(x) * x.shape[-1]
    if x.device.type != "cpu" or x.dtype.itemsize > 2 or shared or not len(plan.row):
        return plan
    more, number = -plan.counts % 32, torch.arange(len(plan.row), device=x.device)
    place = number + (more.cumsum(0) - more)[plan.expert]
    size = len(place) + 31 * len(more)
    pair = number.new_zeros(size).index_copy(0, place, number).cummax(0).values
    weight = plan.weight.new_zeros(size).index_copy(0, place, plan.weight)
    return plan._replace(row=plan.row[pair], weight=weight, counts=plan.counts + more, slot=place[plan.slot])


def check_backend(backend: str, hidden_size: int, width: int, said: str) -> None:
    """ValueError where grouped products are asked for and widths do not fit."""
    if backend == "grouped" and not _fits_grouped(hidden_size, width, torch.bfloat16):
        raise ValueError(
            f"backend grouped needs widths that are multiples of 8, got {said}; use backend loop or other widths"
        )


def unscaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored weights, times the scales of their rows where they have some."""
    return weight.to(dtype) if scale is None else (weight * scale).to(dtype)


def _inner(width: int, activation: Activation) -> int:
    return 2 * width if activation == "swiglu" else width


def _fits_grouped(hidden_size: int, width: int, dtype: torch.dtype) -> bool:
    step = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}.get(dtype)
    return step is not None and hidden_size % step == 0 and width % step == 0

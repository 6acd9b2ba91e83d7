"""Experts in attention (SwitchHead): a head's value and output maps, of which a token uses some.

Shapes: N images, T tokens of an image, D width, H heads of d channels, E experts of a head, numbered h E + e, K of them
serve a token in a head; R = N T tokens, P = R H K (token, head, expert) pairs sorted by expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .experts import _fits_grouped, check_backend, evened
from .kernels import _Combine, _Dispatch, _grouped, _one_by_one, autocast_dtype
from .router import Router
from .select import Plan, plan_of


class AttentionExperts(nn.Module):
    """V_h = sum over e of s_e x W_V^{h,e}, and out = sum over h and e of d_e (A_h V_h) W_O^{h,e}; no biases.

    s = sigmoid(W_s x) and d = sigmoid(W_d x), in float32; of each a head keeps the K largest of its E as they are: they
    do not compete, so nothing has to be balanced. A_h is the caller's. `router` has W_s, then W_d; `w_v` is (H E, d, D)
    and `w_o` (H E, D, d).

    Args:
        hidden_size: Width D.
        num_heads: Heads H.
        head_width: d.
        num_experts: Experts E of each head.
        top_k: K.
        backend: "grouped" (grouped_mm), "loop" (one expert's product after the other), or "auto": the first where it
            applies.

    Raises:
        ValueError: backend grouped with widths that it cannot have.

    Source: SwitchHead (arXiv 2312.07987), whose heads are fewer and narrower than a dense layer's.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_width: int, num_experts: int, top_k: int,
        backend: Literal["auto", "grouped", "loop"] = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_experts, self.top_k, self.backend = num_heads, num_experts, top_k, backend
        d, bank = head_width, num_heads * num_experts
        check_backend(backend, hidden_size, d, f"hidden_size {hidden_size} and {d} channels of {num_heads} heads")
        self.router = Router(hidden_size, 2 * bank)
        self.w_v = nn.Parameter(torch.empty(bank, d, hidden_size))
        self.w_o = nn.Parameter(torch.empty(bank, hidden_size, d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform by the fans of the dense maps that they replace: D to 3 H d (with queries, keys), H d to D."""
        D, A = self.w_v.shape[2], self.num_heads * self.w_v.shape[1]
        nn.init.uniform_(self.w_v, -((6 / (D + 3 * A)) ** 0.5), (6 / (D + 3 * A)) ** 0.5)
        nn.init.uniform_(self.w_o, -((6 / (A + D)) ** 0.5), (6 / (A + D)) ** 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """x (N, T, D) -> values (N, H, T, d), and what makes of attended values (N, H, T, d) the output (N, T, D)."""
        N, T, D = x.shape
        source, destination = self.plans(x)
        rows = x.to(autocast_dtype(x)).reshape(N * T, D)
        source, destination = evened(source, rows), evened(destination, rows)
        row, starts = self._by_token(source)
        pairs = _Dispatch.apply(rows, row, source.slot, starts)  # (P, D)
        out = self._products(pairs, self.w_v, source.counts)
        v = _Combine.apply(out, source.weight, source.row, source.slot, source.starts)  # (R * H, d)
        output = partial(self._output, plan=destination, w_o=self.w_o)
        return v.view(N, T, self.num_heads, v.shape[1]).transpose(1, 2), output

    def _output(self, attended: Tensor, plan: Plan, w_o: Tensor) -> Tensor:
        """(N, H, T, d) -> (N, T, D)."""
        N, _, T, _ = attended.shape
        row, starts = self._by_token(plan)
        pairs = _Dispatch.apply(attended.transpose(1, 2).flatten(0, 2), plan.row, plan.slot, plan.starts)  # (P, d)
        out = self._products(pairs, w_o, plan.counts)
        y: Tensor = _Combine.apply(out, plan.weight, row, plan.slot, starts)
        return y.view(N, T, y.shape[1])

    def plans(self, x: Tensor) -> tuple[Plan, Plan]:
        """Who serves the tokens x (N, T, D) with values, and who with outputs: a row a token and head, experts h E + e.

        `counts` (H E,) is the load. Changes no state.
        """
        logits, _ = self.router(self.router.seen(x))
        source, destination = logits.view(-1, 2, self.num_heads, self.num_experts).unbind(1)  # (R, H, E)
        return self._plan(source), self._plan(destination)

    def _plan(self, logits: Tensor) -> Plan:
        scores, (R, H, E), K = logits.sigmoid(), logits.shape, self.top_k
        best = scores.detach().topk(K, dim=-1).indices  # (R, H, K)
        expert = best + torch.arange(0, H * E, E, device=best.device).unsqueeze(1)
        starts = torch.arange(0, R * H * K, K, device=best.device)
        return plan_of(expert.flatten(), scores.gather(-1, best).flatten(), starts, H * E, K)

    def _by_token(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """`row` and `starts` of a plan whose rows are tokens, each with the H K pairs of its heads."""
        return plan.row // self.num_heads, plan.starts[:: self.num_heads].contiguous()

    def _products(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Each expert's rows (P, in) times its matrix of weight (H E, out, in): (P, out)."""
        grouped = self._use_grouped(rows)
        if torch.compiler.is_compiling() and not (grouped and rows.dtype != torch.float32):
            y: Tensor = self._uncompiled(rows, weight, counts)
            return y
        if grouped:
            return _grouped(rows, weight.to(rows.dtype), counts)
        w = weight.to(rows.dtype).unbind(0)
        return _one_by_one(rows, counts, lambda e, part: part @ w[e].T)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """As of `Experts`: other counts every step, and grouped_mm compiles in 16 bits only."""
        return self._products(rows, weight, counts)

    def _use_grouped(self, rows: Tensor) -> bool:
        if self.backend != "auto":
            return self.backend == "grouped"
        d, D = self.w_v.shape[1:]
        return _fits_grouped(D, d, rows.dtype)

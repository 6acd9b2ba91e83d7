"""The row of metrics.jsonl that a step leaves."""

import math
from typing import Any

import torch
from torch import Tensor

from .schedule import learning_rate
from .step import Run, StepResult


def log_row(run: Run, step: int, result: StepResult) -> dict[str, Any]:
    """What the log says of a step, losses as means over the processes, which all must call it.

    The row of the step that was just skipped has the loss null, and why. Of a mixture it has each set's "mse", as
    "loss_domain_0" and so on, where the step had samples of the set.
    """
    skipped = {"skipped_steps": run.health.skipped}
    if result.faults:
        return {"step": step, "loss": None, **skipped, "faults": result.faults}
    values: Any = run.parallel.accelerator.reduce(torch.stack([*result.losses.values()]), "mean")
    losses = dict(zip(result.losses, values.tolist(), strict=True))
    rate = learning_rate(run.config.train, step - 1)
    known = {"step": step, "loss": losses.pop("total"), **losses, "grad_norm": float(result.grad_norm), "lr": rate}
    return {**known, **_domain_losses(run, result.domains), **skipped, **expert_load(result.counts)}


def _domain_losses(run: Run, domains: Tensor | None) -> dict[str, float]:
    if domains is None:
        return {}
    sums: Any = run.parallel.accelerator.reduce(domains, "sum")
    return {f"loss_domain_{d}": s / n for d, (s, n) in enumerate(zip(*sums.tolist(), strict=True)) if n}


def expert_load(counts: Tensor | None) -> dict[str, list[float]]:
    """Per MoE layer, from (L, E) assignments: max over mean load, experts without a token, entropy in 0..1."""
    if counts is None:
        return {}
    counts = counts.cpu()  # not every device has float64
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(dim=1) / math.log(max(2, counts.shape[1]))
    return {
        "load_max_over_mean": [round(v, 4) for v in (share.amax(dim=1) * counts.shape[1]).tolist()],
        "dead_experts": (counts == 0).sum(dim=1).tolist(),
        "load_entropy": [round(v, 4) for v in entropy.tolist()],
    }

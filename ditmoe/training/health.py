"""Values that are not finite, on any process: seen before the optimiser moves; the step is skipped and counted."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.order import Batch
from ..launch import agree
from ..moe import Routing
from .exchange import local


class Evidence:
    """Which values of one micro-batch are finite, still on the device: its losses by name, its MoE layers' logits."""

    def __init__(self, batch: Batch, losses: Mapping[str, Tensor], routing: Sequence[Routing]) -> None:
        values = {f"router logits of MoE layer {i}": record.logits for i, record in enumerate(routing)}
        values |= {f"loss {name}": value for name, value in losses.items()}
        self.batch, self.finite = batch, {name: value.detach().isfinite().all() for name, value in values.items()}

    def sentences(self) -> list[str]:
        """What is not finite, and in which samples."""
        found, indices = {"images": self.batch.x.isfinite().all(), **self.finite}, self.batch.indices
        wrong = ", ".join(name for name, fine in found.items() if not fine)
        return [f"{wrong} of samples {indices[0]}..{indices[-1]}"] if wrong else []


class Health:
    """Counts the steps that were `skipped`, and those of them that came last, `in_a_row`; `saved` has earlier ones."""

    def __init__(self, accelerator: Accelerator, max_skipped: int, saved: Mapping[str, Any]) -> None:
        self.accelerator, self.max_skipped = accelerator, max_skipped
        self.skipped, self.in_a_row = (int(saved.get(name, 0)) for name in ("skipped_steps", "skipped_in_a_row"))

    @property
    def facts(self) -> dict[str, int]:
        """What a resumed run has to know."""
        return {"skipped_steps": self.skipped, "skipped_in_a_row": self.in_a_row}

    def faults(self, step: int, evidence: Sequence[Evidence], grad_norm: Tensor, model: nn.Module) -> list[str]:
        """What is not finite in this step on any process, in words; empty when all is well.

        Raises:
            FloatingPointError: On every process, after more than `max_skipped` such steps in a row.
        """
        flags = [flag for each in evidence for flag in each.finite.values()]
        fine = torch.stack([*flags, grad_norm.isfinite()]).all()
        if not agree.total(self.accelerator, [float(not fine)])[0]:
            self.in_a_row = 0
            return []
        own = [sentence for each in evidence for sentence in each.sentences()] or _gradients(grad_norm, model)
        rank = self.accelerator.process_index
        found = agree.everything(self.accelerator, [f"rank {rank}: {sentence}" for sentence in own])
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        text = f"step {step} was skipped, not finite: {'; '.join(found)}"
        if rank == 0:
            print(text, file=sys.stderr, flush=True)
        if self.in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite, the last: {text}; no regular checkpoint "
                f"was made since the first of them. Lower train.learning_rate or train.clip, or look at these samples"
            )
        return found


def _gradients(norm: Tensor, model: nn.Module) -> list[str]:
    """Gradients that are not finite by name, after clipping: by a norm of nan it has spoilt all of them."""
    if norm.isfinite():
        return []
    grads = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}  # talks to nobody
    wrong = [name for name, grad in grads.items() if not grad.isfinite().all()]
    return [f"gradient norm {float(norm)}" + (f" ({', '.join(wrong[:5])})" if len(wrong) < len(grads) else "")]

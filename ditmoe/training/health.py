"""Values that are not finite, on any process: seen before the optimiser moves; the step is named, skipped and counted.

Shapes: C channels, H W size, n images of a micro-batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.order import Batch
from ..launch import agree
from ..moe import Routing
from .exchange import local


class Evidence:
    """Of one micro-batch: which of its values are finite, still on the device.

    Args:
        batch: Its images.
        losses: Its losses by name.
        routing: The records of its MoE layers.
    """

    def __init__(self, batch: Batch, losses: Mapping[str, Tensor], routing: Sequence[Routing]) -> None:
        self.samples = f"samples {batch.indices[0]}..{batch.indices[-1]}"
        values = {f"router logits of MoE layer {i}": record.logits for i, record in enumerate(routing)}
        values |= {f"loss {name}": value for name, value in losses.items()}
        self.images = batch.x
        self.names = list(values)
        self.finite = torch.stack([value.detach().isfinite().all() for value in values.values()])

    def sentences(self) -> list[str]:
        """What is not finite, and in which samples."""
        wrong = [name for name, fine in zip(self.names, self.finite.tolist(), strict=True) if not fine]
        if not self.images.isfinite().all():
            wrong.insert(0, "images")
        return [f"{', '.join(wrong)} of {self.samples}"] if wrong else []


class Health:
    """Counts the steps that were skipped.

    Args:
        accelerator: The processes that agree.
        max_skipped: Steps in a row, beyond which the run stops.
        skipped: Steps that were skipped before.
        in_a_row: Those of them that came last.
    """

    def __init__(self, accelerator: Accelerator, max_skipped: int, skipped: int, in_a_row: int = 0) -> None:
        self.accelerator, self.max_skipped, self.skipped, self.in_a_row = accelerator, max_skipped, skipped, in_a_row

    @property
    def facts(self) -> dict[str, int]:
        """What a resumed run has to know."""
        return {"skipped_steps": self.skipped, "skipped_in_a_row": self.in_a_row}

    def faults(self, step: int, evidence: Sequence[Evidence], grad_norm: Tensor, model: nn.Module) -> list[str]:
        """What is not finite in this step on any process, in words; empty when all is well.

        Raises:
            FloatingPointError: On every process, after more than `max_skipped` such steps in a row.
        """
        fine = torch.stack([*(each.finite.all() for each in evidence), grad_norm.isfinite()]).all()
        if not agree.total(self.accelerator, [float(not fine)])[0]:
            self.in_a_row = 0
            return []
        own = [sentence for each in evidence for sentence in each.sentences()] or _gradients(grad_norm, model)
        found = agree.everything(
            self.accelerator, [f"rank {self.accelerator.process_index}: {sentence}" for sentence in own]
        )
        self.skipped += 1
        self.in_a_row += 1
        text = f"step {step} was skipped, not finite: {'; '.join(found)}"
        if self.accelerator.is_main_process:
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
    wrong, total = [name for name, grad in grads.items() if not grad.isfinite().all()], len(grads)
    return [f"gradient norm {float(norm)}" + (f" ({', '.join(wrong[:5])})" if len(wrong) < total else "")]

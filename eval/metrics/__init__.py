"""Scores of features; and the same as `torchmetrics.Metric`s, which need torch and come when asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.metrics.modules import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecallDensityCoverage

__all__ = ["FrechetDistance", "InceptionScore", "KernelDistance", "PrecisionRecallDensityCoverage"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from eval.metrics import modules

    return getattr(modules, name)

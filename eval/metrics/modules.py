"""The scores as `torchmetrics.Metric`s, for any training loop: update with images, compute, reset.

    distance = FrechetDistance(load_extractor("inception-2015")).to(device)
    distance.update(images, real=True)  # again and again; real=False for generated ones
    distance.compute()

Images are uint8 (N, C, H, W), C = 1 (copied to 3) or 3, and are moved to the metric's device. An extractor is an
`eval.networks.extractors.Extractor` or any module that maps such images to features (N, D); it runs in evaluation mode.
No value depends, beyond rounding, on batch sizes, the order of the images or how many processes saw them. Sums are
float64, so on MPS, which has none, a metric stays on the CPU. ValueError for other images, for features that do not fit
or are not finite, and, in `compute`, for a side that had too few images.
"""

import hashlib
from collections.abc import Callable, Sequence
from copy import copy
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from eval.metrics.frechet import add, check_features, frechet_distance, gaussian, join
from eval.metrics.kid import kernel_distance
from eval.metrics.manifold import prdc
from eval.networks.extractors import Extractor, check_images, keeping_dtype

SIDES = ("generated", "real")  # names of states, at bool(real)


class _Score(Metric):  # type: ignore[misc]
    """A metric that goes on after a `compute` that raised, and keeps its precision whatever becomes of its parent's."""

    is_differentiable = False
    full_state_update = False

    def _wrap_compute(self, compute: Callable[[], Any]) -> Any:
        @wraps(compute)
        def unsynced_after() -> Any:
            try:
                return compute()
            finally:  # torchmetrics does so only where nothing was raised
                self.unsync(self._is_synced and self._should_unsync)

        return super()._wrap_compute(unsynced_after)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(fn if self._dtype_convert else keeping_dtype(fn), exclude_state)


class _TwoSets(_Score):
    """Real images and generated ones behind one feature network; a state a side, named as it is."""

    feature_network = "extractor"  # torchmetrics.wrappers.FeatureShare runs it once for several metrics

    def __init__(self, extractor: nn.Module, num_features: int | None, reset_real_features: bool) -> None:
        super().__init__()
        size = getattr(extractor, "num_features", None) if num_features is None else num_features
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"num_features {size!r} of {type(extractor).__name__} must be >= 1; give num_features")
        self.extractor, self.num_features, self.reset_real_features = extractor, size, reset_real_features

    def forward(self, images: Tensor, real: bool) -> None:
        """Refused."""
        raise ValueError("call update, then compute: a batch of one side has no distance")

    def reset(self) -> None:
        """Forget all images, or with `reset_real_features=False` the generated ones."""
        self.unsync(self._is_synced)
        real = copy(getattr(self, SIDES[True]))
        super().reset()
        if not self.reset_real_features:
            setattr(self, SIDES[True], real)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """float64 (N, D), on the metric's device."""
        check_images(images)
        found: Tensor = self.extractor.eval()(images.to(self.device))
        features = found.to(torch.float64, copy=True)  # to be overwritten: FeatureShare hands out the same ones again
        check_features("features", features.cpu().numpy(), self.num_features)
        return features

    def _scalars(self, **values: float) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in values.items()}


class FrechetDistance(_TwoSets):
    """Fréchet distance of the features of generated images to those of real ones (Heusel et al., 2017, eq. 6).

    Memory: 2 * D * D * 8 bytes, twice, whatever the number of images; W times that while W processes are joined.
    `compute` gives a float64 scalar, in feature units squared, >= 0. It may be called FID where the extractor is
    `fid_named` alone. `num_features` is D; None takes the extractor's own. With `reset_real_features=False`, `reset`
    keeps the real images.
    """

    higher_is_better = False

    def __init__(
        self, extractor: nn.Module, num_features: int | None = None, *, reset_real_features: bool = True
    ) -> None:
        super().__init__(extractor, num_features, reset_real_features)
        for side in SIDES:
            zero = torch.zeros(self.num_features + 3, self.num_features, dtype=torch.float64)
            self.add_state(side, zero, dist_reduce_fx=join)

    def update(self, images: Tensor, real: bool) -> None:
        """Add uint8 images (N, C, H, W)."""
        features = self._features(images)
        if len(features):
            add(getattr(self, SIDES[bool(real)]), features)

    def compute(self) -> Tensor:
        """The distance of all images so far. Raises ValueError when a side has fewer than two."""
        for side in SIDES:
            if (count := int(getattr(self, side)[0, 0])) < 2:
                raise ValueError(f"{count} {side} images have no covariance; give at least 2")
        generated, real = (gaussian(getattr(self, side).cpu().numpy()) for side in SIDES)
        return torch.tensor(frechet_distance(generated, real), dtype=torch.float64, device=self.device)


class _Rows(_TwoSets):
    """Keeps the features of `keep` images a side: those with the smallest hash of `seed` and their pixels.

    So which are kept, and in which order, depends on the images alone; `keep` may end among copies of one.
    States are flat float32 rows of 2 + D numbers: the hash in two whole numbers below 2^24, then the features.
    Memory: at most 2 * 2 * keep * (D + 2) * 4 bytes; W times that while W processes are joined. The other arguments are
    those of `FrechetDistance`.
    """

    def __init__(
        self, extractor: nn.Module, num_features: int | None = None, *,
        keep: int = 10_000, seed: int = 0, reset_real_features: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(extractor, num_features, reset_real_features)
        if keep < 2 or not 0 <= seed < 2**32:
            raise ValueError(f"keep {keep} must be at least 2 and seed {seed} between 0 and {2**32 - 1}")
        self.keep, self.seed = keep, seed
        for side in SIDES:
            self.add_state(side, [], dist_reduce_fx="cat")  # of one dimension: torchmetrics joins empty sides so alone

    def update(self, images: Tensor, real: bool) -> None:
        """Add uint8 images (N, C, H, W)."""
        features = self._features(images).float()
        held = getattr(self, SIDES[bool(real)])
        held.append(torch.cat([self._hashes(images).to(features), features], dim=1).flatten())
        if sum(map(len, held)) > 2 * self.keep * (self.num_features + 2):
            held[:] = [self._kept(SIDES[bool(real)]).flatten()]

    def _hashes(self, images: Tensor) -> Tensor:
        seed, pixels = self.seed.to_bytes(4), images.expand(-1, 3, -1, -1).cpu().numpy()
        digests = [hashlib.sha256(seed + image.tobytes()).digest() for image in pixels]
        return torch.tensor([(int.from_bytes(d[:3]), int.from_bytes(d[3:6])) for d in digests]).reshape(-1, 2)

    def _kept(self, side: str) -> Tensor:
        """float32 (<= keep, 2 + D), ascending by hash."""
        held = getattr(self, side)
        rows = (dim_zero_cat(held) if len(held) else torch.empty(0)).reshape(-1, self.num_features + 2)
        for column in (1, 0):
            rows = rows[rows[:, column].argsort(stable=True)]
        return rows[: self.keep]

    def _features_kept(self) -> list[npt.NDArray[np.float32]]:
        return [self._kept(side)[:, 2:].cpu().numpy() for side in SIDES]


class KernelDistance(_Rows):
    """Kernel distance of generated images to real ones: `eval.metrics.kid.kernel_distance`.

    `compute` gives float64 scalars: `kernel_distance`, the mean over random subsets, and `kernel_distance_std` over
    them. Subsets are drawn in the order of the images' hashes, by `eval.fid` in file order: the same estimate.
    Arguments and memory: see `_Rows`.
    """

    higher_is_better = False

    def compute(self) -> dict[str, Tensor]:
        """Both numbers. Raises ValueError when a side has fewer than two images."""
        found = kernel_distance(*self._features_kept())
        return self._scalars(kernel_distance=found.mean, kernel_distance_std=found.std)


class PrecisionRecallDensityCoverage(_Rows):
    """Fidelity and diversity of generated images: `eval.metrics.manifold.prdc`.

    `compute` gives float64 scalars `precision`, `recall`, `density` and `coverage`. Arguments and memory: see `_Rows`.
    """

    higher_is_better = True

    def compute(self) -> dict[str, Tensor]:
        """All four. Raises ValueError when a side has no more images than neighbours are asked for."""
        generated, real = self._features_kept()
        return self._scalars(**prdc(real, generated)._asdict())


class InceptionScore(_Score):
    """exp(mean over images of KL(p(y|x) || p(y))) of all images as one split (Salimans et al., 2016, section 4).

    `compute` gives a float64 scalar between 1 and C = `num_classes`. The published figures, and `eval.fid`'s, are means
    over splits of 5,000 images in file order, which a loop does not have: they agree up to 5,000 images. Memory: C * 8
    bytes. `extractor` is an `Extractor` with logits, or any module that maps uint8 images to logits (N, C).
    """

    higher_is_better = True

    def __init__(self, extractor: nn.Module, num_classes: int = 1008) -> None:
        super().__init__()
        self.extractor, self.num_classes = extractor, num_classes
        for name, size in {"count": (), "sum_p": (num_classes,), "sum_p_log_p": ()}.items():
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Add generated uint8 images (N, C, H, W). Raises ValueError where the extractor has no logits."""
        check_images(images)
        images = images.to(self.device)
        net = self.extractor.eval()
        logits = net.features(images).logits if isinstance(net, Extractor) else net(images)
        if logits is None:
            raise ValueError(f"{net.name} has no logits, which the Inception Score needs; take inception-2015")
        check_features("logits", logits.double().cpu().numpy(), self.num_classes)
        log_p = logits.double().log_softmax(dim=1)
        self.count += len(log_p)
        self.sum_p += log_p.exp().sum(dim=0)
        self.sum_p_log_p += (log_p.exp() * log_p).sum()

    def compute(self) -> Tensor:
        """The score of all images so far. Raises ValueError when there were none."""
        if not self.count:
            raise ValueError("0 images have no Inception Score; give some")
        q = self.sum_p / self.count
        divergence: Tensor = self.sum_p_log_p / self.count - torch.special.xlogy(q, q).sum()
        return divergence.clamp(min=0).exp()  # a KL below 0 is rounding

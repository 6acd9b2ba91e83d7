"""Does a class-conditional sample show its class, is it a copy of a training image, and do the pixels fit as they are?

Real images are the yardstick of both: the classifier's accuracy on held-out real images stands beside that on samples,
and the copy rule is set so that 1 % of held-out real images break it. Images are uint8 (n, H, W, C); sides above 32
pixels are averaged down to 32 first. Shapes: n and m images, H W C their size, P = H*W*C numbers of an image.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.sources.arrays import Float32Array, IndexArray, UInt8Array

PASSES = 60_000  # images the classifier sees in training, at most
LARGEST_SIDE = 32  # pixels; larger images are averaged down
NEIGHBOURS = 5  # training images that the copy ratio looks at
REAL_SHARE = 0.01  # share of real images that the copy rule flags, by construction


def judge(
    images: UInt8Array, labels: IndexArray | None, train: UInt8Array, train_labels: IndexArray,
    held_out: tuple[UInt8Array, IndexArray] | None, names: Sequence[str], seed: int = 0, mirrored: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The answers for generated images as JSON values: "classes", None without labels; "copies"; "pixels", None where
    there are no more images than an image has numbers, too few for its covariance.

    Args:
        images: generated; labels (N,) are what was asked for, None of a model without classes.
        train: what the model was trained on, with train_labels (n,), and, where `mirrored`, on the mirror images too.
        held_out: real images that it never saw, with labels. None: a tenth of the training images is kept from the
            classifier to try it on, and the copy rule compares training images with each other.
        names: of the classes; seed: of the classifier.
    """
    classes = None
    if labels is not None and names:
        cut = 0 if held_out else max(1, len(train) // 10)
        real, real_labels = held_out or (train[:cut], train_labels[:cut])
        classifier = train_classifier(train[cut:], train_labels[cut:], seed, num_classes=len(names))
        right = classifier.predict(images) == labels
        by_class = {names[c]: float(right[labels == c].mean()) for c in np.unique(labels)}
        weakest = min(by_class, key=lambda name: by_class[name])
        classes = {
            "accuracy": float(right.mean()), "real_accuracy": accuracy(classifier, real, real_labels),
            "worst": [weakest, by_class[weakest]], "by_class": by_class,
            "num_train": min(len(train) - cut, PASSES), "num_real": len(real),
        }  # fmt: skip
    known = np.concatenate([train, train[:, :, ::-1]]) if mirrored else train
    copies = nearest_copies(images, known, held_out[0] if held_out else None)
    numbers = {k: v for k, v in vars(copies).items() if not isinstance(v, np.ndarray)}
    pixels, P = None, images[0].size
    if min(len(images), len(known)) > P:
        pixels = {"value": pixel_distance(images, known), "num_train": len(known)}
        if held_out and (n := min(len(images), len(held_out[0]))) > P:  # fewer are further away: equally many
            few = pixel_distance(images[:n], known)
            pixels |= {"few_value": few, "real_value": pixel_distance(held_out[0][:n], known), "num_real": n}
    return {"classes": classes, "copies": {**numbers, "definition": copies.definition}, "pixels": pixels}


def pixel_distance(images: UInt8Array, others: UInt8Array) -> float:
    """Fréchet distance of the pixels themselves, scaled to 0..16 as scikit-learn's digits have them.

    For images of few pixels, where no network stands between the picture and the score. Each side has two or more. Few
    images are further away than many: 300 of the training digits are 25 from all 1,497, 1,000 of them 3.
    """

    def fitted(some: UInt8Array) -> Gaussian:
        statistics = FeatureStatistics()
        for start in range(0, len(some), 10_000):
            part = some[start : start + 10_000]
            statistics.update(part.reshape(len(part), -1) * np.float64(16 / 255))
        return statistics.gaussian()

    return frechet_distance(fitted(images), fitted(others))


class Classifier(nn.Module):
    """A small convolutional network."""

    def __init__(self, channels: int, size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((channels, 16 if channels == 1 else 32, 48, 96)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        layers[-1:] = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * (size[0] // 4) * (size[1] // 4), num_classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of x (n, C, H, W) in [-1, 1]."""
        logits: Tensor = self.layers(x)
        return logits

    @torch.no_grad()
    def predict(self, images: UInt8Array) -> IndexArray:
        """The most likely class (n,) of uint8 images (n, H, W, C)."""
        self.eval()
        found: IndexArray = torch.cat([self(part).argmax(1) for part in _pixels(images).split(500)]).numpy()
        return found


def train_classifier(
    images: UInt8Array, labels: IndexArray, seed: int = 0, *, num_classes: int | None = None
) -> Classifier:
    """A classifier of real images (n, H, W, C), H and W at least 4, trained within a budget of `PASSES` image passes.

    Weights and order are a function of (images, labels, seed) on one machine; torch's global random state is left
    alone. No augmentation: on the digits, shifts by a pixel cost accuracy. `labels` (n,) are in [0, num_classes), which
    is one more than the largest label when None. Raises ValueError where images and labels do not match or are none.
    """
    if images.ndim != 4 or len(images) != len(labels) or not len(images):
        raise ValueError(f"images {images.shape} and labels {labels.shape} do not match; give (n, H, W, C), (n,)")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:PASSES].numpy()
    x = _pixels(images[chosen]).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(np.asarray(labels, np.int64)[chosen])
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(x.shape[1], (x.shape[2], x.shape[3]), classes)
        _fit(classifier.to(memory_format=torch.channels_last), x, y, generator)
    return classifier.eval()


def _fit(classifier: Classifier, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """AdamW with a one-cycle learning rate; 1 to 30 epochs, whole batches only."""
    batch = min(128, len(x))
    per_epoch = len(x) // batch
    steps = per_epoch * int(np.clip(PASSES // len(x), 1, 30))
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    classifier.train()
    order = torch.arange(len(x))
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step % per_epoch * batch :][:batch]
        loss = F.cross_entropy(classifier(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(classifier: Classifier, images: UInt8Array, labels: IndexArray) -> float:
    """Share in [0, 1] of images (n, H, W, C) that the classifier gives their label (n,)."""
    return float((classifier.predict(images) == labels).mean())


@dataclass(frozen=True)
class Copies:
    """How many generated images are copies of training images, by `nearest_copies`.

    Why not d_1 alone, the usual choice, with the same quantile: it is unfair between classes (trousers, or the digit 1,
    lie close together, so nearly all alarms fall there, while a noisy copy of a rich image passes) and it flags blurry
    averages. Dividing by the local spacing mends both. Source of the idea: the calibrated distance of Carlini et al.
    2023 (arXiv 2301.13188); few neighbours keep the power when images are few. It does not see copies that are shifted,
    mirrored or recoloured, nor near-copies of an image that the training set holds five times over. A threshold from n
    images is itself uncertain: the true share of real images below it is 1 % give or take about 1 / sqrt(100 n).
    """

    share: float  # of the generated images that count as copies, in [0, 1]
    real_share: float  # the same of the real images that set the threshold: 0.01, up to steps of 1 / num_real
    threshold: float  # a ratio up to this is a copy
    distance: float  # median over generated images to the nearest training image: RMS over pixels, levels of 255
    real_distance: float  # the same for the real images
    ratios: Float32Array  # (n,), of the generated images
    nearest: IndexArray  # (n,), index of the nearest training image of each
    num_train: int
    num_real: int
    held_out: bool  # the real images were held out; else training images, each compared with all others

    @property
    def definition(self) -> str:
        """The rule in one sentence, for the reader of a report."""
        real = "held-out real images" if self.held_out else "training images, each against the rest"
        return (
            f"A sample counts as a copy when its pixel distance (L2) to the nearest of {self.num_train:,} training "
            f"images is at most {self.threshold:.2f} times its mean distance to the next {NEIGHBOURS - 1}; by the "
            f"choice of that factor {self.real_share:.1%} of {self.num_real:,} {real} do."
        )


def nearest_copies(generated: UInt8Array, train: UInt8Array, held_out: UInt8Array | None = None) -> Copies:
    """Generated images that stand unusually close to one single training image.

    With d_1 <= d_2 <= ... the L2 distances of an image to the training images, pixels in [-1, 1], the ratio

        r = d_1 / mean(d_2, ..., d_5)

    is about 0.85 for a new image among its like and 0 for an exact copy. An image is a copy when r is at most the 1 %
    quantile of r over held-out real images, so about 1 % of real new images are flagged too: a share near 1 % says
    "no copying seen", not "1 % copies".

    Args:
        generated, train, held_out: uint8 (n, H, W, C), (m, H, W, C), what the model was trained on, m > 5, and
            (o, H, W, C), real images it never saw. None, for a set without any: training images stand in.

    At most 2,000 real images set the threshold, evenly chosen.
    Raises ValueError where sizes differ or there are too few images.
    """
    real = train if held_out is None else held_out
    shapes = {images.shape[1:] for images in (generated, train, real)}
    if len(shapes) != 1:
        raise ValueError(f"images of different sizes {sorted(shapes)} cannot be compared; use one")
    if len(train) <= NEIGHBOURS or not len(real) or not len(generated):
        found = f"{len(generated)} generated, {len(train)} training and {len(real)} held-out images"
        raise ValueError(f"{found} are too few to look for copies; use at least 1, {NEIGHBOURS + 1} and 1")
    pixels = _pixels(train).flatten(1)
    rows = np.linspace(0, len(real) - 1, min(2000, len(real))).astype(np.int64)
    r_real, d_real, _ = _ratios(real[rows], pixels, own=rows if held_out is None else None)
    ratios, distances, nearest = _ratios(generated, pixels)
    # the largest ratio that 1 % of them reach from below; of fewer than 100, below all; at least 0: exact copies
    rank, ordered = int(REAL_SHARE * len(rows)), np.sort(r_real)
    threshold = max(0.0, float(ordered[rank - 1] if rank else np.nextafter(ordered[0], np.float32(-1))))
    to_levels = 127.5 / pixels.shape[1] ** 0.5
    return Copies(
        share=float((ratios <= threshold).mean()), real_share=float((r_real <= threshold).mean()), threshold=threshold,
        distance=float(np.median(distances)) * to_levels, real_distance=float(np.median(d_real)) * to_levels,
        ratios=ratios, nearest=nearest, num_train=len(train), num_real=len(rows), held_out=held_out is not None,
    )  # fmt: skip


def _ratios(
    images: UInt8Array, pixels: Tensor, own: IndexArray | None = None
) -> tuple[Float32Array, Float32Array, IndexArray]:
    """r, d_1 and the index of the nearest, each (n,), of images among pixels (m, P) but for `own`."""
    squares = pixels.square().sum(1)
    distances, indices = [], []
    for k, part in enumerate(_pixels(images).flatten(1).split(256)):
        rough = torch.addmm(squares, part, pixels.T, alpha=-2)  # (256, m), less |part|^2
        if own is not None:
            rough[torch.arange(len(part)), torch.from_numpy(own[256 * k :][:256])] = torch.inf
        near = rough.topk(NEIGHBOURS, largest=False).indices
        # by difference, because |a|^2 + |b|^2 - 2ab cannot tell an exact copy from a near one
        exact, order = (part[:, None] - pixels[near]).norm(dim=2).sort(dim=1)
        distances.append(exact)
        indices.append(near.gather(1, order)[:, 0])
    d = torch.cat(distances)
    ratio = d[:, 0] / d[:, 1:].mean(1).clamp_min(1e-12)
    return ratio.numpy(), d[:, 0].numpy(), torch.cat(indices).numpy()


def _pixels(images: UInt8Array) -> Tensor:
    """float32 (n, C, H, W) in [-1, 1], sides at most LARGEST_SIDE."""
    if images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype}; give uint8, values 0 to 255")
    parts = []
    for start in range(0, len(images), 1000):
        x = torch.from_numpy(images[start : start + 1000].astype(np.float32)).permute(0, 3, 1, 2)
        largest = max(x.shape[2:])
        if largest > LARGEST_SIDE:
            height, width = (max(4, round(side * (LARGEST_SIDE / largest))) for side in x.shape[2:])
            x = F.adaptive_avg_pool2d(x, (height, width))
        parts.append(x / 127.5 - 1)
    return torch.cat(parts).contiguous()

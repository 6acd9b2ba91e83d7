"""Scores of many image sets against one data set, whose statistics and classifier are made once and kept on disk.

    python -m benchmarks.scoring FILE.npz ... --preset fashion

prints a row a file (arr_0 images, arr_1 labels), and one of as many held-out real images: the Fréchet distance to the
training images, precision and recall against as many of them as there are samples, by each extractor, and the
recognised share.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditmoe.config.presets import PRESETS
from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.data.sets import ImageSet
from eval.judge import Classifier, accuracy, train_classifier
from eval.measure import Wanted, measure
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.manifold import prdc
from eval.networks.extractors import load_extractor
from eval.sources.open import open_source

Images = NDArray[np.uint8]


def precision(name: str) -> torch.autocast:
    """The context in which a network runs: "bf16", products in bfloat16 as in training, or "fp32"."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=name == "bf16")


class Scorer:
    """Fréchet distance to the training images, and how many samples a classifier recognises.

    Args:
        config: Says which data set, and its image size.
        cache: Folder for the statistics of the training images and the classifier.
        extractor: See eval.networks.extractors.
        num_ref: Training images of the reference, the first ones; None takes all.
        sets: (name, training images, held-out ones), instead of those of the config.
    """

    def __init__(
        self, config: Config, cache: Path, extractor: str = "random-conv-v1", num_ref: int | None = None,
        sets: tuple[str, ImageSet, ImageSet] | None = None,
    ) -> None:  # fmt: skip
        name, self.train, self.test = sets or (config.data.name, *(self._open(config, s) for s in ("train", "test")))
        self.net = load_extractor(extractor)
        cache.mkdir(parents=True, exist_ok=True)
        self.reference = self._reference(cache / f"{name}-{extractor}-{num_ref or 'all'}.npz", num_ref)
        self.classifier = self._classifier(cache / f"{name}-classifier.pt")

    def distance(self, images: Images) -> float:
        """Of uint8 images (N, H, W, C)."""
        return frechet_distance(self._gaussian(images), self.reference)

    def recognised(self, images: Images, labels: NDArray[np.int64]) -> float:
        """Share of images that the classifier takes for the class asked for."""
        return accuracy(self.classifier, images, labels)

    def real(self, num: int) -> dict[str, float]:
        """The same scores of the first `num` held-out real images."""
        images = self.test.images(range(num))
        return {"fd": self.distance(images), "recognised": self.recognised(images, self.test.labels[:num])}

    def _open(self, config: Config, split: str) -> ImageSet:
        return open_data(config.data, size=config.model.sample_size, channels=config.model.in_channels, split=split)

    def _gaussian(self, images: Images) -> Gaussian:
        return measure(open_source(images), self.net, Wanted(), batch_size=500).gaussian

    def _reference(self, path: Path, num: int | None) -> Gaussian:
        if not path.exists():
            made = self._gaussian(self.train.images(range(num or len(self.train))))
            np.savez(path, mu=made.mean, sigma=made.covariance)
        with np.load(path, allow_pickle=False) as file:
            return Gaussian(file["mu"], file["sigma"])

    def _classifier(self, path: Path) -> Classifier:
        shape = self.train.images([0]).shape
        if not path.exists():
            rows = np.random.default_rng(0).permutation(len(self.train))
            trained = train_classifier(self.train.images(rows.tolist()), self.train.labels[rows])
            torch.save(trained.state_dict(), path)
        net = Classifier(shape[3], (shape[1], shape[2]), len(self.train.id2label))
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()


class Judge(Scorer):
    """Also precision and recall, against as many training images as there are samples."""

    real_rows: Any = None  # their features

    def judged(self, images: Images, wanted: bool) -> dict[str, float]:
        """The distance, and where wanted the other two."""
        if not wanted:
            return {"fd": self.distance(images)}
        keep = Wanted(keep=len(images))
        if self.real_rows is None or len(self.real_rows) != min(len(images), len(self.train)):
            real = self.train.images(range(min(len(images), len(self.train))))
            self.real_rows = measure(open_source(real), self.net, keep, batch_size=500).features
        found = measure(open_source(images), self.net, keep, batch_size=500)
        measures = prdc(self.real_rows, found.features)
        fd = frechet_distance(found.gaussian, self.reference)
        return {"fd": fd, "precision": measures.precision, "recall": measures.recall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--preset", choices=list(PRESETS), default="fashion")
    parser.add_argument("--extractors", nargs="+", default=["efficientnet-lite0", "random-conv-v1"])
    parser.add_argument("--num-ref", type=int, help="of the distance's reference, the first ones; default: all")
    parser.add_argument("--cache", type=Path, default=Path("runs/scoring"))
    args = parser.parse_args()
    judges = {name: Judge(PRESETS[args.preset], args.cache, name, args.num_ref) for name in args.extractors}
    columns = [f"{what} {name}" for name in judges for what in ("Fréchet distance,", "precision,", "recall,")]
    print("| images | N | recognised | " + " | ".join(columns) + " |\n|" + "---|" * (3 + len(columns)))

    def row(title: str, images: Images, labels: NDArray[np.int64]) -> None:
        share = next(iter(judges.values())).recognised(images, labels)
        found = [judge.judged(images, True) for judge in judges.values()]
        values = [f"{each['fd']:.4g} | {each['precision']:.3f} | {each['recall']:.3f}" for each in found]
        print(f"| {title} | {len(images)} | {share:.1%} | " + " | ".join(values) + " |", flush=True)

    for file in args.files:
        with np.load(file, allow_pickle=False) as arrays:
            row(str(file), arrays["arr_0"], arrays["arr_1"])
            num = len(arrays["arr_0"])
    real = next(iter(judges.values())).test
    row("held-out", real.images(range(num)), real.labels[:num])


if __name__ == "__main__":
    main()

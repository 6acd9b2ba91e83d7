"""The section `data` of a configuration: one set of images, or several. Imports no torch."""

import math
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .checks import MOST, at_least, require

_NAMED = ("digits", "fashion")  # sets that a mixture has by their names; ./digits is a folder
_TABLE = "hf:"  # begins a set of a mixture that is a table


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from."""

    name: Literal["digits", "fashion", "folder", "hf", "latents"] = "digits"
    """digits (bundled), fashion (Fashion-MNIST), folder (one sub-folder a class), hf (a data set as Hugging Face's
    `datasets` has them; extra: data), latents (safetensors shards, made by python -m ditmoe encode)."""
    path: Path | None = None
    """Folder of the images, of the IDX files, or of the latent shards; hf: a folder of parquet files or one that
    save_to_disk made, or OWNER/NAME of the Hub."""
    label_column: str | None = None
    """folder: the column of its metadata.jsonl (or .csv) that is the class; hf: of the table, None: the only one that
    says it is of classes, or is called label. mixture: of each set that is a table or has such a file."""
    image_column: str | None = None
    """hf: the column of the images; None: the only one."""
    split: str = "train"
    """hf: the split to train on; test or validation, where it is another, is held out."""
    subset: str | None = None
    """hf: the configuration of a data set that has several."""
    stream: bool = False
    """hf: read parquet files a group of rows at a time, from where they are; images are shuffled among 256 MB of them
    (sets below 2 GB in pixels are read once, and shuffled as a whole)."""
    vae: Path | None = None
    """latents: folder of the VAE that made them, saved with the model so that it draws pictures."""
    download: bool = False
    """Let torchvision download Fashion-MNIST into ./data when it is nowhere else."""
    fit: Literal["exact", "crop"] = "exact"
    """Images (not latents) must have sample_size and in_channels exactly, or are resized, centre-cropped and converted:
    halved while twice too large, then bicubic, as in ADM."""
    flip: bool = False
    """Mirror images left-right at random; of latents, take those of the mirrored images."""
    num_workers: int = 0
    """Processes that read images; 0 reads in the training process."""
    max_bad: int = 0
    """folder, hf: images that cannot be used and are skipped, each named, before the run stops."""
    mixture: tuple[str, ...] = ()
    """Several sets in one run, instead of `name`: SET, SET=WEIGHT or SET@SIZE each, where SET is digits, fashion, a
    folder of images or hf:PLACE (as `path` with hf), and samples are of a set in proportion to its weight (1 if not
    given). The number of a set, from 0, is its domain; classes are put side by side. SIZE (with `alternate`): its
    images are seen in so many pixels."""
    alternate: bool = False
    """mixture: each optimiser step is of one set, in turn (IMP); otherwise every step has samples of all."""

    def __post_init__(self) -> None:
        at_least(self, 0, "num_workers", "max_bad")
        self._check_mixture()
        names = [part.name for part, _ in self.sets()] if self.mixture else [self.name]
        name = " and ".join(dict.fromkeys(names))
        require(not self.max_bad or bool({"folder", "hf"} & {*names}), f"max_bad works with folder and hf, not {name}")
        columns = bool({"folder", "hf"} & {*names})
        require(self.label_column is None or columns, f"label_column works with folder and hf, not {name}")
        table = self.image_column or self.subset or self.split != "train"
        option = "image_column" if self.image_column else "subset" if self.subset else "split"
        require(not table or "hf" in names, f"{option} works with the data set hf, not {name}")
        streams = name == "hf" and not self.mixture
        also = " in a mixture" if self.mixture else ""
        require(not self.stream or streams, f"stream works with the data set hf, not {name}{also}")
        require(not self.download or "fashion" in names, f"download works with the data set fashion, not {name}")
        require(not self.download or self.path is None, "download does not apply beside path; leave one of them out")
        require(self.path is None or name != "digits", "path does not apply to digits, which are bundled")
        require(self.fit == "exact" or name != "latents", "fit crop works with images, not latents")
        require(self.vae is None or name == "latents", f"vae works with latents, not {name}")

    def sets(self) -> "list[tuple[DataConfig, int]]":
        """The sets of the run, a configuration of each alone, with whole numbers in proportion to their weights."""
        entries = [_weighted(entry) for entry in self.mixture]
        whole = math.lcm(*(weight.denominator for _, weight in entries))
        return [(self._alone(*_sized(word)), int(weight * whole)) for word, weight in entries] or [(self, 1)]

    def resolutions(self) -> list[int | None]:
        """Of each set of the mixture the pixels that its images have in height and width, None: as the model says."""
        return [_sized(_weighted(entry)[0])[1] for entry in self.mixture]

    def _alone(self, word: str, size: int | None) -> "DataConfig":
        named, table = word in _NAMED, word.startswith(_TABLE)
        kind: Any = word if named else "hf" if table else "folder"
        path = None if named else Path(word.removeprefix(_TABLE))
        return replace(
            self,
            mixture=(),
            alternate=False,
            name=kind,
            path=path,
            max_bad=self.max_bad if path else 0,
            label_column=self.label_column if path else None,
            image_column=self.image_column if table else None,
            subset=self.subset if table else None,
            split=self.split if table else "train",
            stream=False,
            download=self.download and kind == "fashion",
            fit="exact" if size is None and self.fit == "exact" else "crop",
        )

    def _check_mixture(self) -> None:
        entries = [_weighted(entry) for entry in self.mixture]
        places = [_place(word) for word, _ in entries]
        if again := next((n for n, place in enumerate(places) if place in places[:n]), None):
            word, same = entries[places.index(places[again])][0], entries[again][0]
            also = "" if same == word else f", once as {same}"
            raise ValueError(f"mixture has {word} twice{also}; give it a weight, as in {word}=2")
        require(len(places) != 1, f"mixture has one set, {', '.join(self.mixture)}; add another, or give --data.name")
        require(not places or self.path is None, "path does not apply to a mixture, in which places are named")
        require(bool(places) or not self.alternate, "alternate needs several sets; give them as --data.mixture SET SET")
        if self.alternate and len({weight for _, weight in entries}) > 1:
            raise ValueError("alternate takes the sets in turn, so it does not go with weights; leave one of them out")
        if any(self.resolutions()) and not self.alternate:
            raise ValueError("mixture has images of several sizes, and a step takes those of one; add --data.alternate")


def _sized(word: str) -> tuple[str, int | None]:
    """SET or SET@SIZE of a mixture. ValueError where the size is 0."""
    name, at, size = word.rpartition("@")
    sized = bool(name and at and size.isdecimal())
    require(not sized or int(size) > 0, f"mixture has {word}, of size 0; give a number of pixels")
    return (name, int(size)) if sized else (word, None)


def _place(word: str) -> tuple[str, int | None]:
    """What SET or SET@SIZE is known by, however its path is written."""
    name, size = _sized(word)
    kind = _TABLE if name.startswith(_TABLE) else ""
    return name if name in _NAMED else f"{kind}{os.path.realpath(name.removeprefix(kind))}", size


def _weighted(entry: str) -> tuple[str, Fraction]:
    """SET or SET=WEIGHT of a mixture. ValueError where the weight is none."""
    word, equals, text = entry.rpartition("=")
    if not equals:
        word, text = entry, "1"
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if word in ("", _TABLE) or not 1 / MOST <= weight <= MOST:
        named = "SET" if word in ("", _TABLE) else word
        raise ValueError(f"mixture has {entry!r}; give SET or SET=WEIGHT with a weight above 0, such as {named}=2")
    return word, Fraction(str(weight))

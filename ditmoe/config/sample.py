"""What the commands that take a trained model are asked: sample, exposure, analyze, centroids. No torch."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .checks import at_least, writable

_FILES = (  # what people mean a file by; a folder may have any other suffix
    ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".ico", ".ppm",
    ".pgm", ".jxl", ".psd", ".pdf", ".svg", ".mp4", ".mov", ".avi", ".webm", ".mkv", ".npy", ".h5", ".hdf5", ".pkl",
    ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".parquet", ".arrow", ".zip", ".tar", ".tgz", ".txz",
    ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml",
    ".toml", ".xml", ".txt", ".md", ".log", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".sh",
)  # fmt: skip


@dataclass(frozen=True)
class SampleArgs:
    """Draw images from a trained model and write them to a folder, an .npz file (ADM's layout) or one .png grid."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a pipeline folder such as models/fashion."""
    out: Path | None = None
    """FILE.png (one grid, a row a class) or FILE.npz (arr_0, arr_1 labels), replaced if there; or a folder, continued
    if it holds a part of the same images. Default: samples.png; with --score, nothing is kept."""
    sampler: str | None = None
    """A name of samplers.SAMPLERS; default: the one saved with the model."""
    steps: int | None = None
    """Sampling steps; default: saved with the model."""
    cfg: float | None = None
    """Classifier-free guidance scale, 1 for none; default: saved with the model."""
    num: int | None = None
    """Number of images, classes in turn; default: 8 a class."""
    classes: tuple[str | int, ...] | None = None
    """The class of every image, its label (a number) or its name (Sneaker), instead of --num."""
    seed: int = 0
    """Image i depends on (seed, i, its label) alone."""
    batch_size: int | None = None
    """Images drawn at once; does not change them. Default: what suits the model and the device."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the network; auto: bf16 where products in it are fast (recent GPUs, some CPUs), else fp32."""
    compile: bool = False
    """Compile the network's blocks: pays for many images, as it takes a minute or more."""
    cache: str | None = None
    """Work kept between steps, taylor:N: the blocks are run every N steps, and foretold from the last two times in
    between; not in the first three. Faster, and other images."""
    cached_experts: int | None = None
    """Room in memory for so many experts of a layer; the others are read from the model's folder when they are needed.
    Default: all are in memory."""
    score: str | None = None
    """Score the images against this reference, as python -m eval.fid has it: folder, .npz, fashion:train, ..."""
    extractor: str | None = None
    """Feature network of the score; default: random-conv-v1."""
    weights: Path | None = None
    """File of the extractor's weights, where it reads one."""
    metrics: tuple[Literal["sfid", "is", "kid", "prdc"], ...] = ()
    """Scores beside the Fréchet distance."""
    report: Path | None = None
    """JSON file for the score's report; default: printed."""
    eta: float = 0.0
    """Noise of ddim and ts-ddim: 0 (none) to 1 (as much as DDPM)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide between these two timesteps alone (lowest, highest, of 0..1000)."""
    guidance_channels: int | None = None
    """Guide only so many first channels (DiT: 3 of 4); default: saved with the model, else all."""
    guidance_rule: Literal["cfg", "cfg++"] = "cfg"
    """Classifier-free guidance, or CFG++ (ddim and flow-euler; give --cfg too, between 0 and 1)."""
    guide: str | None = None
    """Autoguidance: who guides, beside --cfg: a weaker model (a model folder, a run folder, or one of its checkpoints,
    RUN/checkpoints/step-000123), experts-off (this model without its routed experts), or none. Default: saved with the
    model, if any."""
    guide_scale: float | None = None
    """Scale of the guide, 1 for none; default: saved with the model, 2 for a guide that is given."""
    tau: tuple[str, ...] | None = None
    """Of models that select relative, top_p or threshold, instead of their own: a number, or LOW-HIGH=TAU for each span
    of the network's time (0..1000)."""
    policy: Path | None = None
    """JSON file of experts that are suppressed, forced or favoured (docs/steering.md)."""
    epsilon_scale: float = 1.0
    """Epsilon scaling: the predicted noise is divided by this; 1 is off, 1.005 typical."""
    exposure_window: int | None = None
    """ts-*: full width of the time-shift window, in training steps; default: 4 T / N^2 for N network calls."""
    exposure_cutoff: int | None = None
    """ts-*: no shift at or below this timestep."""
    exposure_mode: Literal["target", "network", "both"] | None = None
    """ts-*: what is shifted: the step's end, the network's timestep, or that and the step's start."""
    exposure_variance: str | None = None
    """ts-*: published, calibrated (the data's variance, saved with the model), or a number."""
    exposure_min_snr: float | None = None
    """ts-*: noise guard; 0 is as published."""
    flow_shift: float | None = None
    """Warps the steps towards noise (above 1) where they are even in the flow's time, as those of flow-* are, and of
    dpm++2m and unipc where this is given; not time-shift sampling. Default: saved with the model."""

    def __post_init__(self) -> None:
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(map(label_or_name, self.classes)))
        if self.classes is not None and self.num is not None:
            raise ValueError("give --num or --classes, not both")
        if self.num is not None and self.num > 10**7:
            raise ValueError(f"num is {self.num}; it must be at most 10000000")
        if self.classes == ():
            raise ValueError("classes is empty; give the label of every image, as in --classes 3 7 7")
        if self.report is not None and self.report.suffix.lower() != ".json":
            raise ValueError(f"report {self.report} must end in .json")
        if self.score is None and (self.report or self.extractor or self.weights or self.metrics):
            raise ValueError("report, extractor, weights and metrics belong to a score; give --score REF too")
        if self.guide == "none" and self.guide_scale is not None:
            raise ValueError(f"guide_scale is {self.guide_scale}, but guide is none; leave one of them out")
        if self.score == "":
            raise ValueError("score is empty; give what to compare with: folder, .npz, fashion:train, ...")
        if self.score is not None and (self.num == 1 or (self.classes is not None and len(self.classes) == 1)):
            raise ValueError(f"{'num' if self.num else 'classes'} asks for 1 image; a score needs 2 or more")
        if self.sampler == "":
            raise ValueError("sampler is empty; give a name of samplers.SAMPLERS, or leave it out")
        if (out := self.place) is not None:
            writable("out", out)
            kind = out.suffix.lower()
            if kind in _FILES:
                raise ValueError(f"out {out}: give a .png or .npz file, or a folder of PNG files, not {kind}")
            if out.exists() and out.is_dir() == (kind in (".png", ".npz")):
                kind = "is a folder; give a file name" if out.is_dir() else "is a file that is neither .png nor .npz"
                raise ValueError(f"out {out} {kind}")
        variance = self.exposure_variance
        if variance not in (None, "published", "calibrated") and not _is_number(variance):
            raise ValueError(f"exposure_variance {variance!r} is neither published, calibrated nor a number")
        if self.cache is not None and not re.fullmatch(r"taylor:([2-9]|10)", self.cache):
            raise ValueError(f"cache is {self.cache!r}; give taylor:N with N from 2 to 10, such as taylor:2")
        at_least(self, 1, "num", "steps", "batch_size", "cached_experts")

    @property
    def place(self) -> Path | None:
        """Where the images go; None where they are scored alone."""
        return self.out or (None if self.score else Path("samples.png"))

    def tau_spans(self) -> list[tuple[float, float, float]] | None:
        """(lowest time, highest time, tau) of each span. ValueError for a word that is none."""
        return None if self.tau is None else [_span(word) for word in self.tau]

    def score_options(self) -> dict[str, Any]:
        """What `eval.fid.score` is told."""
        extractor = self.extractor or "random-conv-v1"
        at_once = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {"weights": self.weights, "metrics": self.metrics, "extractor": extractor, **at_once}

    def sampler_options(self) -> dict[str, Any]:
        """Fields of the scheduler that were asked for, by the names that the schedulers have for them."""
        options = {name: value for name, value in vars(self).items() if name.startswith("exposure_")}
        if _is_number(self.exposure_variance):
            options["exposure_variance"] = float(options["exposure_variance"])
        return {name: x for name, x in options.items() if x is not None}


@dataclass(frozen=True)
class ExposureArgs:
    """How far do the images that a sampler passes through stray from those that the network was trained on?

    Prints, for every sampler and step, the variance of the images over that of training images, and plots it.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a pipeline folder such as models/fashion."""
    samplers: tuple[str, ...] = ("ddim",)
    """Names of samplers.SAMPLERS."""
    steps: int = 20
    """Sampling steps."""
    num: int = 256
    """Number of images, classes in turn."""
    cfg: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    epsilon_scale: float = 1.0
    """Epsilon scaling: the predicted noise is divided by this; 1 is off, 1.005 typical."""
    seed: int = 0
    """Image i depends on (seed, i, its label) alone."""
    batch_size: int = 64
    """Images drawn at once; does not change them."""
    data_variance: float | None = None
    """Mean variance over the pixels of clean training images; default: saved with the model."""
    out: Path = Path("exposure.png")
    """The plot, a .png, .pdf or .svg file."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num", "batch_size")
        if not self.samplers:
            raise ValueError("samplers is empty; give a name of samplers.SAMPLERS or more")
        a_file = self.out.suffix.lower() in (".png", ".pdf", ".svg") and not self.out.is_dir()
        if not a_file or not self.out.absolute().parent.is_dir():
            raise ValueError(f"out {self.out} must be a .png, .pdf or .svg file in a folder that exists")
        writable("out", self.out)


@dataclass(frozen=True)
class AnalyzeArgs:
    """Who serves what: what the choice of experts depends on, how even it is, and how it changes with the noise.

    Held-out images of the model's own data set (training images where it has none) are noised to every time step and
    pass through the network once. Prints tables; writes analysis.json and analysis.png. `analyze contrast MODEL --a
    class=3 --b class=7` says which experts serve one group more than another.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or pipeline folders such as models/fashion; of several, such as seeds of one configuration, means
    with 95 % intervals."""
    num: int = 500
    """Number of images, as many of every class; fewer where a class has fewer."""
    bins: int = 10
    """Bins of the time axis; every image passes once in each."""
    seed: int = 0
    """Which images, and their noise."""
    data_path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """Folder of the images, where it is not that of the training."""
    out: Path = Path("analysis")
    """Folder of analysis.json and analysis.png, made if it is not there."""

    def __post_init__(self) -> None:
        at_least(self, 2, "num", "bins")
        at_least(self, 0, "seed")
        if not self.models:
            raise ValueError("models is empty; give a run folder or a model folder, or several")
        if twice := [model for i, model in enumerate(self.models) if model.resolve() in _resolved(self.models[:i])]:
            raise ValueError(f"models has {twice[0]} twice; give every run once")
        if self.bins > 1000:
            raise ValueError(f"bins is {self.bins}; the time axis has 1000 steps")
        writable("out", self.out)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out {self.out} is a file; give a folder")


@dataclass(frozen=True)
class CentroidsArgs:
    """Fit the centres of --moe.router centroid to the tokens of a trained model, dense or with experts.

    Training images of its own data set are noised to every time and pass through it with their labels. Of every block
    as many centres are found (k-means), and moved until about as many tokens are nearest to each (3 times at most,
    where the tokens allow). `train.py PRESET --moe.preset centroid --moe.centroids FILE` trains with them.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a pipeline folder such as models/fashion."""
    experts: int
    """Centres of a block: moe.num_experts of the model that is to be trained."""
    out: Path
    """The file, FILE.safetensors; replaced if it is there."""
    router_input: Literal["plain", "token"] = "plain"
    """What the routers look at: tokens before adaLN modulates them (plain), as the preset centroid has it, or after."""
    num: int = 1000
    """Number of images; a smaller set is gone through again, with other noise."""
    seed: int = 0
    """Which images and tokens, their noise, and where the fit starts."""
    data_path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """Folder of the images, where it is not that of the training."""

    def __post_init__(self) -> None:
        at_least(self, 1, "experts", "num")
        at_least(self, 0, "seed")
        if self.num > 20_000:
            raise ValueError(f"num is {self.num}; it must be at most 20000, as many tokens are looked at")
        if self.out.suffix.lower() != ".safetensors" or self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise ValueError(f"out {self.out} must be a .safetensors file in a folder that exists")
        writable("out", self.out)


def label_or_name(word: str | int) -> int | str:
    """What a word says of a class: 7 is a label; 007, +7 and 7_0 are names."""
    return int(word) if isinstance(word, str) and word.isdecimal() and str(int(word)) == word else word


def _resolved(paths: tuple[Path, ...]) -> list[Path]:
    return [path.resolve() for path in paths]


def _span(word: str) -> tuple[float, float, float]:
    times, found, tau = word.rpartition("=")
    low, _, high = times.partition("-") if found else ("0", "", "1000")
    if not all(map(_is_number, (low, high, tau))):
        raise ValueError(f"tau has {word!r}; give a number, or LOW-HIGH=TAU such as 0-500=0.3")
    return float(low), float(high), float(tau)


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False

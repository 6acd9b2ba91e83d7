"""argv to a configuration, and errors to exit codes. Nothing heavy is imported here.

Exit codes: 0 done, 2 the user's mistake (one sentence), 143 stopped by a signal after saving, 1 anything else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from .config import Config
from .presets import PRESETS
from .signals import EXIT_CODE, Interrupted, Signals

DEFAULT_PRESET = "digits"
OURS = ("ditmoe", "samplers", "eval")  # beside each other, in a checkout or in site-packages


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
    classes: tuple[int, ...] | None = None
    """The label of every image, instead of --num."""
    seed: int = 0
    """Image i depends on (seed, i, its label) alone."""
    batch_size: int = 64
    """Images drawn at once; does not change them."""
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
    """Guide only so many first channels (DiT: 3 of 4)."""
    guidance_rule: Literal["cfg", "cfg++"] = "cfg"
    """Classifier-free guidance, or CFG++ (ddim and flow-euler; give --cfg too, between 0 and 1)."""
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
    """flow-*: warps the grid of timesteps towards noise (above 1); not time-shift sampling."""

    def __post_init__(self) -> None:
        if self.classes is not None and self.num is not None:
            raise ValueError("give --num or --classes, not both")
        if self.classes == ():
            raise ValueError("classes is empty; give the label of every image, as in --classes 3 7 7")
        if self.report is not None and self.report.suffix != ".json":
            raise ValueError(f"report {self.report} must end in .json")
        if self.score is None and (self.report or self.extractor or self.weights or self.metrics):
            raise ValueError("report, extractor, weights and metrics belong to a score; give --score REF too")
        if self.score == "":
            raise ValueError("score is empty; give what to compare with: folder, .npz, fashion:train, ...")
        if self.score is not None and (self.num == 1 or (self.classes is not None and len(self.classes) == 1)):
            raise ValueError(f"{'num' if self.num else 'classes'} asks for 1 image; a score needs 2 or more")
        if self.out is not None and self.out.exists() and self.out.is_dir() == (self.out.suffix in (".png", ".npz")):
            kind = "is a folder; give a file name" if self.out.is_dir() else "is a file that is neither .png nor .npz"
            raise ValueError(f"out {self.out} {kind}")
        if self.exposure_variance not in (None, "published", "calibrated") and not _is_number(self.exposure_variance):
            raise ValueError(
                f"exposure_variance {self.exposure_variance!r} is neither published, calibrated nor a number"
            )
        for name in ("num", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")

    def score_options(self) -> dict[str, Any]:
        """What `eval.fid.score` is told."""
        options = {name: getattr(self, name) for name in ("weights", "metrics", "batch_size")}
        return {**options, "extractor": self.extractor or "random-conv-v1"}

    def sampler_options(self) -> dict[str, Any]:
        """Fields of the scheduler that were asked for, by the names that the schedulers have for them."""
        names = {field.name: field.name for field in dataclasses.fields(self) if field.name.startswith("exposure_")}
        names["flow_shift"] = "shift"
        options = {theirs: getattr(self, ours) for ours, theirs in names.items() if getattr(self, ours) is not None}
        if _is_number(options.get("exposure_variance")):
            options["exposure_variance"] = float(options["exposure_variance"])
        return options


@dataclass(frozen=True)
class LatentArgs:
    """Encode images with a VAE into safetensors shards, from which training reads them (--data.name latents). Under
    torchrun or accelerate launch the processes share the work; the same command again goes on."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder with one sub-folder a class, or with tar files of KEY.jpg (png, ...) and KEY.cls (WebDataset's layout)."""
    vae: Path
    """Folder of an AutoencoderKL of diffusers: config.json and .safetensors weights."""
    out: Path
    """Folder of the shards and of latents.json, which is written when all are there."""
    size: int = 256
    """Height and width to which images are resized and centre-cropped, in pixels."""
    shard_size: int = 4096
    """Images in a shard."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the stored latents; the VAE computes in float32."""
    flip: bool = True
    """Also encode the mirrored images, which --data.flip needs; twice the time and size."""
    batch_size: int = 32
    """Images encoded at once by a process."""
    num_workers: int = 4
    """Threads of a process that read images."""
    max_bad: int = 0
    """Images that cannot be used and are left out, each named, before the program stops."""

    def __post_init__(self) -> None:
        for name in ("size", "shard_size", "batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.max_bad < 0:
            raise ValueError(f"max_bad is {self.max_bad}; it must be 0 or more")


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False


def parse_train(argv: Sequence[str]) -> Config:
    """`[PRESET | RUN/config.json] [--section.field value ...]` -> Config.

    Mistakes end the program with exit code 2 and a sentence; `--help` ends it with 0.
    """
    named = bool(argv) and not argv[0].startswith("-")
    start, rest = (argv[0], argv[1:]) if named else (DEFAULT_PRESET, argv)
    base = PRESETS[start] if start in PRESETS else _load(start)
    presets = ", ".join(PRESETS)
    return tyro.cli(
        Config,
        prog=f"train.py {start}",
        description=f"Train a diffusion transformer with experts: train.py [PRESET | RUN/config.json] [options]. "
        f"Presets: {presets}. Defaults below are those of {start}.",
        default=base,
        args=list(rest),
    )


def parse_sample(argv: Sequence[str]) -> SampleArgs:
    """`MODEL [options]` -> SampleArgs; mistakes end the program with exit code 2."""
    return tyro.cli(SampleArgs, prog="sample.py", args=list(argv))


def parse_latents(argv: Sequence[str]) -> LatentArgs:
    """`DATA --vae PATH --out DIR [options]` -> LatentArgs; mistakes end the program with exit code 2."""
    return tyro.cli(LatentArgs, prog="python -m ditmoe.latents", args=list(argv))


def run(main: Callable[[], None]) -> int:
    """Call `main` and turn what it raises into an exit code; a user's mistake is one sentence on stderr.

    A signal raises Interrupted in it, wherever it is, but where training has to save first.
    """
    try:
        with Signals(raising=True):
            main()
    except ValueError as error:
        if not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return EXIT_CODE
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _is_ours(error: ValueError) -> bool:
    """Whether our own code raised it, and so meant it for the user; a library's ValueError is a bug of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    root, file = Path(__file__).parents[1], Path(trace.tb_frame.f_code.co_filename)
    ours = root in file.parents and file.relative_to(root).parts[0] in OURS
    return ours or (root in file.parents and "site-packages" not in file.parts)


def _load(start: str) -> Config:
    path = Path(start)
    if path.suffix == ".json" or path.exists():
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            _stop(f"{path} is not a configuration that can be read: {error}")
        if not isinstance(values, dict):
            _stop(f"{path} does not hold a configuration")
        config = tyro.cli(Config, prog=str(path), args=list(as_flags(values)))
        return replace(config, out=path.parent, dry_run=False)
    near = get_close_matches(start, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    _stop(f"there is no preset or file {start!r}; {hint}presets are {', '.join(PRESETS)}")


def as_flags(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A saved configuration as command-line flags, so that one parser checks files and flags alike."""
    for key, value in values.items():
        flag = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from as_flags(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            section, _, name = flag.rpartition(".")
            yield "--" + (f"{section}." if section else "") + ("" if value else "no-") + name
        else:
            yield from (f"--{flag}", str(value))


def _stop(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)

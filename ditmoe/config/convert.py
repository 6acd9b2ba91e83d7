"""What `convert` and `export` are asked. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .checks import at_least, require, writable
from .experts import RouterInput
from .sections import PredictionType

Family = Literal["dit", "sit", "dit-moe", "diffusers"]
DomainKind = Literal["time", "class", "data"]
CHANGES = ("upcycle", "more", "prune", "merge", "split", "int8", "lora")
_OF_OTHERS = ("source", "num_heads", "prediction_type", "vae")  # options of others' checkpoints
_OF = {  # options of some changes alone
    "by": ("prune",), "blocks": ("upcycle", "split"), "tau": ("split",), "domains": ("split",),
    "keep": ("split",), "num": ("prune", "split"), "data_path": ("prune", "split"),
    "seed": ("upcycle", "more", "prune", "split"), "copies": ("upcycle",), "router_input": ("upcycle",),
}  # fmt: skip


@dataclass(frozen=True)
class ConvertArgs:
    """Make a model folder of a checkpoint of DiT, SiT, DiT-MoE or diffusers' DiT; or take a dense model out of one; or,
    with one of --upcycle, --more, --prune, --merge, --split, --int8 and --lora, make of a model another one.

    Of others' checkpoints weights keep their precision, and what one does not say is asked for. A changed model is in
    float32 (but for --int8), and its training.json trains it on: python train.py OUT/training.json --out RUN.
    """

    src: Annotated[Path, tyro.conf.Positional]
    """A .pt or .safetensors file, a diffusers DiT folder; to take one out or change it, a folder of ours."""
    out: Annotated[Path, tyro.conf.Positional]
    """The new model folder, which python sample.py takes; with --to dit a .pt file."""
    to: Literal["ditmoe", "diffusers", "dit"] = "ditmoe"
    """A model folder of ours, of diffusers' DiTPipeline, or a file with the names of the official DiT."""
    source: Annotated[Family | None, tyro.conf.arg(name="from")] = None
    """Whose checkpoint it is; default: as its names and notes tell. DiT and SiT have the same names."""
    num_heads: int | None = None
    """Attention heads; default: as its width (those of the papers), its q_norm or its config tells."""
    top_k: int | None = None
    """dit-moe: experts of a token; default: as its notes tell, else 2, as all published ones have. upcycle: likewise,
    default 2."""
    prediction_type: PredictionType | None = None
    """What it predicts; default: as its notes or its scheduler tell, or its paper for the published sizes."""
    vae: Path | None = None
    """Folder of the VAE of its latents, saved along so that the model draws pictures; default: that of a diffusers
    folder."""
    upcycle: int | None = None
    """Make of every dense layer so many experts: other cuts of the same layer, whose best top_k together are the layer.
    The same function at the start, at the same cost."""
    copies: bool = False
    """upcycle: every expert is the whole layer, at top_k times the cost."""
    router_input: RouterInput = "token"
    """upcycle: what routers look at."""
    more: bool = False
    """Twice the experts at the same cost: the same function until it is trained on."""
    prune: int | None = None
    """Keep so many experts of each layer."""
    by: Literal["contribution", "load", "random"] = "contribution"
    """prune: those that add most to tokens, that serve most tokens, or any."""
    merge: Path | None = None
    """Take in the experts of this model too, and the mean of all else."""
    split: int | None = None
    """Cut every dense layer into so many experts: of like units (D2DMoE), of which a token has as many as it needs; or
    with --domains of the units that are most active in a domain (Read-ME), of which an image has its own."""
    domains: DomainKind | None = None
    """split: make an expert for each of so many equal ranges of time, of so many equal groups of classes, or for each
    data set of a mixture; what all of them need is the shared expert. One router decides for all layers, by the time
    or by the label."""
    keep: float = 0.5
    """split with domains: share of a dense layer's units that an image has, shared ones and those of its expert."""
    int8: bool = False
    """Store experts as int8 with a scale a row, and the rest in bfloat16: to draw with, not to train on."""
    lora: Path | None = None
    """Add to the weights what this folder holds, a LoRA adapter of the model."""
    blocks: Literal["all", "every-second"] = "all"
    """upcycle, split: which blocks get experts."""
    tau: float = 0.5
    """split without domains: of the rule; 1 is all experts, that is the dense layer. `sample.py --tau` draws with
    another."""
    num: int = 500
    """prune by contribution or load, split: training images, noised to all times, that experts are measured by."""
    seed: int = 0
    """Of what is left to chance in a change."""
    data_path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """prune, split: folder of those images, where it is not that of the training."""
    force: bool = False
    """Replace OUT if it is there."""

    @property
    def change(self) -> str | None:
        """The change that is asked for."""
        return next((name for name in CHANGES if getattr(self, name) not in (None, False)), None)

    def _check_change(self) -> None:
        asked = [name for name in CHANGES if getattr(self, name) not in (None, False)]
        require(len(asked) <= 1, f"--{' and --'.join(asked)} are two changes; make one after the other")
        require(0 <= self.tau <= 1, f"tau is {self.tau}; it must lie in [0, 1]")
        require(0 < self.keep < 1, f"keep is {self.keep}; it must lie between 0 and 1")
        checks = [(n, self.change in of, f"works with {' or '.join(f'--{x}' for x in of)}") for n, of in _OF.items()]
        measured = self.change != "prune" or self.by != "random"
        why = "is of what experts are measured by, and --by random measures none"
        checks += [("num", measured, why), ("data_path", measured, why)]
        checks += [("tau", self.domains is None, "is of a split without --domains")]
        checks += [("keep", self.domains is not None, "is of a split with --domains")]
        for name, applies, why in checks:
            flag = name.replace("data_path", "data.path").replace("_", "-")
            unused = getattr(self, name) == getattr(ConvertArgs, name)
            require(applies or unused, f"--{flag} {why}")
        if self.change:
            require(self.top_k is None or self.change == "upcycle", f"--top-k does not apply to --{self.change}")
            self._refuse(_OF_OTHERS, f"--{self.change}")
            require(self.to == "ditmoe", f"--to {self.to} does not go with --{self.change}; do one after the other")

    def _refuse(self, names: Sequence[str], beside: str) -> None:
        for name in names:
            flag = {"source": "from"}.get(name, name.replace("_", "-"))
            require(getattr(self, name) is None, f"--{flag} does not apply to {beside}; leave it out")

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "top_k", "num")
        at_least(self, 0, "seed")
        at_least(self, 1, "prune")
        at_least(self, 2, "upcycle", "split")
        self._check_change()
        require(self.out.name != "", f"out {self.out} has no name; give one that is not there yet")
        require(self.force or not self.out.exists(), f"out {self.out} exists; give another one, or --force")
        require(self.out.absolute().parent.is_dir(), f"out {self.out} must be in a folder that exists")
        writable("out", self.out.absolute().parent)
        check_replaced("out", self.out, "src", self.src)
        if self.to == "dit":
            fits = self.out.suffix == ".pt" and not self.out.is_dir()
            require(fits, f"out {self.out} must be a .pt file with --to dit")
        else:
            require(not self.out.is_file(), f"out {self.out} is a file; a folder is written")
        if self.to != "ditmoe":
            self._refuse((*_OF_OTHERS, "top_k"), f"--to {self.to}")


def check_replaced(what: str, out: Path, of: str, src: Path) -> None:
    """ValueError where to write `out` would take `src` away, or a folder that has files and is no model's."""
    place, kept = out.resolve(), src.resolve()
    require(kept not in (place, *place.parents), f"{what} lies in {of}; give a place outside of it")
    require(place not in kept.parents, f"{of} lies in {what}, which would be replaced")
    if place.is_dir() and any(place.iterdir()) and not (place / "model_index.json").is_file():
        raise ValueError(f"{what} {out} holds files and no model, so that nothing replaces it; give another place")


@dataclass(frozen=True)
class ExportArgs:
    """Write the averaged weights of a finished run as a pipeline folder to share."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, or one that was exported (but not --standalone, which holds code)."""
    folder: Annotated[Path, tyro.conf.Positional]
    """The new pipeline folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the stored weights; bfloat16 has half the size."""
    vae: Path | None = None
    """For a model of latents: folder of their VAE, saved along so that the pipeline draws pictures."""
    guide: str | None = None
    """A weaker model that the folder holds as its guide, or experts-off, as python sample.py has it."""
    guide_scale: float | None = None
    """Scale of the guide when none is asked for; default: 2."""
    force: bool = False
    """Replace the folder if it is there."""
    license: str = "unknown"
    """The licence that the README names, as the Hub spells it: apache-2.0, cc-by-4.0, other, ..."""
    standalone: bool = False
    """Add a pipeline.py, with which diffusers reads the folder where ditmoe is not installed (trust_remote_code=True);
    ditmoe itself, which runs no code of folders, does not."""
    push: str | None = None
    """OWNER/NAME on the Hugging Face Hub to upload it to, privately (after hf auth login)."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            said = f"license is {self.license!r}; give it as the Hub spells it, in small letters without spaces"
            raise ValueError(f"{said}: apache-2.0, mit, cc-by-4.0, other, ...")
        if self.push is not None and self.push.strip("/").count("/") != 1:
            raise ValueError(f"push is {self.push!r}; give OWNER/NAME")
        if self.guide_scale is not None and self.guide is None:
            raise ValueError(
                f"guide_scale is {self.guide_scale}, but there is no guide; give --guide PATH or experts-off"
            )
        if self.guide == "none":
            raise ValueError("guide is none, which a model without --guide has; leave it out")
        require(self.folder.name != "", f"folder {self.folder} has no name; give one that is not there yet")
        writable("folder", self.folder.absolute().parent)

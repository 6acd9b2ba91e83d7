"""What `convert` is asked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .checks import at_least, require
from .sections import PredictionType

Family = Literal["dit", "sit", "dit-moe", "diffusers"]


@dataclass(frozen=True)
class ConvertArgs:
    """Make a model folder of a checkpoint of DiT, SiT, DiT-MoE or diffusers' DiT; or take a dense model out of one.

    Weights keep their precision. What a checkpoint does not say is asked for.
    """

    src: Annotated[Path, tyro.conf.Positional]
    """A .pt or .safetensors file, a diffusers DiT folder; with --to diffusers or dit a run folder or a model folder."""
    out: Annotated[Path, tyro.conf.Positional]
    """The new model folder, which python sample.py takes; with --to dit a .pt file."""
    to: Literal["ditmoe", "diffusers", "dit"] = "ditmoe"
    """A model folder of ours, of diffusers' DiTPipeline, or a file with the names of the official DiT."""
    source: Annotated[Family | None, tyro.conf.arg(name="from")] = None
    """Whose checkpoint it is; default: as its names and notes tell. DiT and SiT have the same names."""
    num_heads: int | None = None
    """Attention heads; default: as its width (those of the papers), its q_norm or its config tells."""
    top_k: int | None = None
    """dit-moe: experts of a token; default: as its notes tell, else 2, as all published ones have."""
    prediction_type: PredictionType | None = None
    """What it predicts; default: as its notes or its scheduler tell, or its paper for the published sizes."""
    vae: Path | None = None
    """Folder of the VAE of its latents, saved along so that the model draws pictures; default: that of a diffusers
    folder."""
    force: bool = False
    """Replace OUT if it is there."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "top_k")
        require(self.force or not self.out.exists(), f"out {self.out} exists; give another one, or --force")
        require(self.out.absolute().parent.is_dir(), f"out {self.out} must be in a folder that exists")
        require(self.src.resolve() not in (self.out.resolve(), *self.out.resolve().parents), "out lies in src")
        require(self.out.resolve() not in self.src.resolve().parents, "src lies in out, which would be replaced")
        if self.to == "dit":
            fits = self.out.suffix == ".pt" and not self.out.is_dir()
            require(fits, f"out {self.out} must be a .pt file with --to dit")
        else:
            require(not self.out.is_file(), f"out {self.out} is a file; a folder is written")
        if self.to != "ditmoe":
            for name in ("source", "num_heads", "top_k", "prediction_type", "vae"):
                flag = {"source": "from"}.get(name, name.replace("_", "-"))
                require(getattr(self, name) is None, f"--{flag} does not apply to --to {self.to}; leave it out")

"""What `export` is asked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class ExportArgs:
    """Write the averaged weights of a finished run as a pipeline folder to share."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    folder: Annotated[Path, tyro.conf.Positional]
    """The new pipeline folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the stored weights; bfloat16 has half the size."""
    vae: Path | None = None
    """For a model of latents: folder of their VAE, saved along so that the pipeline draws pictures."""
    force: bool = False
    """Replace the folder if it is there."""

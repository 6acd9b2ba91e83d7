"""What `encode` is asked. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .checks import at_least


@dataclass(frozen=True)
class LatentArgs:
    """Encode images with a VAE into safetensors shards, from which training reads them (--data.name latents). Under
    torchrun or accelerate launch the processes share the work; the same command again goes on."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder with one sub-folder a class, or with tar files of KEY.jpg (png, ...) and KEY.cls (WebDataset's layout); or
    a table as Hugging Face's `datasets` has them: a .parquet file, a folder of them, or what save_to_disk made."""
    vae: Path
    """Folder of an AutoencoderKL of diffusers: config.json and .safetensors weights."""
    out: Path
    """Folder of the shards and of latents.json, which is written when all are there."""
    label_column: Annotated[str | None, tyro.conf.arg(name="data.label-column")] = None
    """Of a folder, the column of its metadata.jsonl (or .csv) that is the class; of a table, its column."""
    image_column: Annotated[str | None, tyro.conf.arg(name="data.image-column")] = None
    """Of a table, the column of the images; default: the only one."""
    split: Annotated[str, tyro.conf.arg(name="data.split")] = "train"
    """Of a table, the split to encode."""
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
        at_least(self, 1, "size", "shard_size", "batch_size", "num_workers")
        at_least(self, 0, "max_bad")

"""The VAE between pixels and latents: opened from a local folder, and known by its weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..files import check_component, read_object


def load_vae(folder: Path, latents: Mapping[str, Any] | None) -> AutoencoderKL:
    """The VAE of a pipeline whose network makes these latents, see `DiTMoEPipeline`.

    Raises ValueError where it is not the one that made them, or the latents do not say which did.
    """
    if latents is None:
        why = "the latents do not say which VAE made them, as those of python -m ditmoe encode do"
        raise ValueError(f"vae {folder} cannot be checked: {why}")
    vae = open_vae(folder)
    check_vae(vae, latents)
    return vae


def open_vae(folder: Path) -> AutoencoderKL:
    """A VAE of diffusers from a local folder, float32, for inference. Nothing in the folder is executed.

    Raises ValueError where the folder holds none that is whole.
    """
    try:
        kind = read_object(folder / "config.json").get("_class_name")
        if kind != AutoencoderKL.__name__:
            raise ValueError(f"its config.json is of a {kind!r:.100}, not an AutoencoderKL")
        if not check_component(folder):
            raise ValueError("it holds no .safetensors weights; pickled ones are never opened")
        vae, found = AutoencoderKL.from_pretrained(  # it renames the tensors of the VAEs of Stable Diffusion 1 and 2
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if found["missing_keys"]:
            raise ValueError(f"its weights lack {', '.join(sorted(found['missing_keys'])[:5])}")
    except (OSError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, TypeError) as error:
        raise ValueError(f"vae {folder} is not a VAE that can be loaded: {' '.join(str(error).split())}") from error
    return vae.float().eval().requires_grad_(False)


def latent_shape(vae: AutoencoderKL, size: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of images of `size` x `size` pixels. ValueError where the VAE takes no such images."""
    channels, factor = vae.config.in_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if channels not in (1, 3):
        raise ValueError(f"the VAE takes {channels} channels; images have 1 (grey) or 3 (RGB)")
    if size % factor:
        raise ValueError(f"size {size} is not a multiple of {factor}, by which the VAE scales down")
    return vae.config.latent_channels, size // factor, size // factor


def identity(vae: AutoencoderKL, folder: Path) -> dict[str, Any]:
    """What a set of latents notes of its VAE; the weights decide which one it is, see `check_vae`."""
    return {
        "name": str(read_object(folder / "config.json").get("_name_or_path") or folder.resolve().name),
        "sha256": weights_sha256(vae),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor,
    }


def check_vae(vae: nn.Module, known: Mapping[str, Any]) -> None:
    """ValueError unless the VAE is the one that made the latents, where its weights are known (a checkpoint of others
    does not say them: sha256 is empty)."""
    if known["vae"]["sha256"] and (found := weights_sha256(vae)) != known["vae"]["sha256"]:
        what = f"the VAE with weights {found[:12]} is another one than that of the latents"
        raise ValueError(f"{what}, {vae_words(known)}")


def vae_words(known: Mapping[str, Any]) -> str:
    """Name and weights of the VAE, for a message."""
    return f"{known['vae']['name']} (weights {known['vae']['sha256'][:12]})"


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of names, shapes and float32 values of all tensors: the same however the weights are stored."""
    known = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        known.update(f"{name} {tuple(value.shape)}\n".encode())
        known.update(value.detach().cpu().float().contiguous().flatten().view(torch.uint8).numpy().data)
    return known.hexdigest()

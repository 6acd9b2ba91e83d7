"""A dense model of ours taken out: as diffusers' DiTPipeline, or as a file with the names of the official DiT."""

import shutil
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from ..config.convert import ConvertArgs
from ..files import read_object, replacing, weight_files, whole, write_json
from ..model import DiTMoETransformer2DModel
from ..model.layers import sincos_positions
from ..pipeline.folder import find
from ..pipeline.handed_in import blank, check_pipeline
from .layouts import theirs
from .tensors import Entry, Tensors, save, write

_NEEDED = {  # of a network that the official DiT is, too
    "moe_blocks": "none", "activation": "gelu", "positions": "sincos", "qk_norm": "none", "refine_width": 0,
    "local_conv": False, "long_skips": False, "attention_experts": 0, "head_width": None, "time_scale": 1000.0,
    "reverse_time": False,
}  # fmt: skip
_CHAIN = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def give(args: ConvertArgs) -> None:
    """Write a dense model as `args.to` has it.

    Raises:
        ValueError: There is no model at `args.src`, or it has parts that DiT does not have.
    """
    place = find(args.src)
    index = check_pipeline(place)
    config = read_object(place / "transformer" / "config.json")
    defaults = {name: p.default for name, p in signature(DiTMoETransformer2DModel.__init__).parameters.items()}
    settings = {name: config.get(name, default) for name, default in defaults.items() if name != "self"}
    _refuse(args, settings, index.get("latents"))
    tensors = Tensors(files := weight_files(place / "transformer"))
    if args.to == "dit":
        names = {theirs(name, "dit", 0, 0)[0][0]: name for name in tensors.shapes}
        first = tensors.dtypes["x_embedder.proj.weight"]
        table = sincos_positions(settings["hidden_size"], settings["sample_size"] // settings["patch_size"]).to(first)
        with whole(args.out) as file:
            save(file, names, files, {"pos_embed": table})
    else:
        with replacing(args.out) as temporary:
            _write_diffusers(place, temporary, index, settings, tensors)
    fixed = {"freq_shift": 1} if args.to == "diffusers" else {"freq_shift": 0, "norm2_eps": 1e-6}
    for name, value in fixed.items():
        if settings[name] != value:
            print(f"note: {args.to} computes with {name} {value}, and the model with {settings[name]}: answers differ")
    print(f"wrote {args.out}")


def _refuse(args: ConvertArgs, settings: dict[str, Any], latents: dict[str, Any] | None) -> None:
    for name, value in _NEEDED.items():
        if settings[name] != value:
            raise ValueError(f"src {args.src} has {name} {settings[name]}; DiT has {value}, so it cannot be taken out")
    if settings["head_experts"] > 1 or not settings["num_classes"]:
        raise ValueError(f"src {args.src} has several heads or no classes, unlike DiT, so it cannot be taken out")
    if latents is not None and (any(latents["mean"]) or len({*latents["std"]}) > 1):
        raise ValueError(f"src {args.src} is of latents normalised channel by channel, and {args.to} has one factor")
    kind = settings["prediction_type"]
    if kind == "flow_prediction" or (args.to == "dit" and kind != "epsilon"):
        raise ValueError(f"src {args.src} predicts {kind}, which {args.to} does not, so it cannot be taken out")


def _write_diffusers(
    place: Path, folder: Path, index: dict[str, Any], settings: dict[str, Any], tensors: Tensors
) -> None:
    heads, width, depth = settings["num_heads"], settings["hidden_size"], settings["depth"]
    channels = settings["in_channels"]
    net = blank(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
            out_channels=channels * (2 if settings["learn_sigma"] else 1), num_layers=depth,
            sample_size=settings["sample_size"], patch_size=settings["patch_size"],
            num_embeds_ada_norm=settings["num_classes"], norm_eps=settings["norm2_eps"],
        ),
        limit=40 * depth + 40,
    )  # fmt: skip
    net.save_config(folder / "transformer")  # type: ignore[operator]
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    entries = [entry for name in tensors.shapes for entry in _entries(name, depth, tensors)]
    assert {entry.name: entry.shape for entry in entries} == wanted
    write(folder / "transformer", entries)
    scheduler = read_object(place / "scheduler" / "scheduler_config.json")
    chain = {name: scheduler[name] for name in _CHAIN if name in scheduler}
    chain["prediction_type"] = settings["prediction_type"]
    diffusers.DDIMScheduler(**chain, clip_sample=False).save_pretrained(folder / "scheduler")
    if (place / "vae").is_dir():
        shutil.copytree(place / "vae", folder / "vae")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__,
            "id2label": index.get("id2label") or {}, "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": index.get("vae", [None, None]),
        },
    )  # fmt: skip


def _entries(name: str, depth: int, tensors: Tensors) -> Iterator[Entry]:
    """Theirs of one of ours: its parts, in every copy."""
    shape = tensors.shapes[name]
    for copy in theirs(name, "diffusers", depth, 0):
        rows = shape[0] // len(copy)
        for at, part in enumerate(copy):

            def pieces(start: int = at * rows, rows: int = rows) -> Iterator[Tensor]:
                yield tensors[name][start : start + rows]

            yield Entry(part, tensors.dtypes[name], (rows, *shape[1:]), pieces)

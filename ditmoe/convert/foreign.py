"""A checkpoint of others, recognised: its tensors, the network that they are of, and how it is meant to be used.

Shapes: C channels, D width, E experts, F hidden width, T tokens of an image, p patch size.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config.checks import require
from ..config.convert import ConvertArgs
from ..config.sections import ObjectiveConfig, PredictionType, SampleConfig
from ..files import WEIGHTS, check_component, read_object, weight_files
from .layouts import POSITIONS, recognise, theirs
from .tensors import Tensors

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1408: 16}  # of the widths of the papers
_EPSILON, _FLOW = (384, 768), (1152, 1408)  # widths of the published DiT-MoE that predict noise; a flow's velocity
_DRAWN = {  # how the official code draws: sampler, steps, guidance scale, guided channels
    "dit": ("ddpm", 250, 4.0, 3),
    "sit": ("flow-euler", 250, 4.0, 3),
    "dit-moe": ("ddpm", 250, 4.0, 3),
    "dit-moe-flow": ("flow-euler", 50, 7.0, None),
    "diffusers": ("ddim", 50, 4.0, None),
}


class Foreign(NamedTuple):
    """What was found."""

    tensors: Tensors
    layout: str  # a key of LAYOUTS
    family: str  # whose it is, as `--from` has it
    settings: dict[str, Any]  # of our network
    objective: ObjectiveConfig
    sample: SampleConfig
    channels: int | None  # how many of the first are guided, None for all
    id2label: dict[int, str]  # where class names are known
    vae: Path | None  # its folder, where there is one

    def names(self, ours: str) -> list[list[str]]:
        """As of `theirs`."""
        return theirs(ours, self.layout, self.settings["depth"], self.settings.get("num_experts", 0))

    @property
    def positions(self) -> str:
        """Their name of the fixed table of positions."""
        return POSITIONS.get(self.layout, "pos_embed")


def open_foreign(args: ConvertArgs) -> Foreign:
    """What lies at `args.src`.

    Raises:
        ValueError: It is of no layout that is known, is damaged, lacks a part, or does not say something that an option
            has to say then.
    """
    folder, index = args.src, {}
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            index = read_object(folder / "model_index.json")
            if index.get("_class_name") == "DiTMoEPipeline":
                what = f"src {folder} is a model folder of ours; --to diffusers or dit takes it out, and"
                raise ValueError(f"{what} --upcycle, --more, --prune, --merge, --split, --int8 or --lora changes it")
            folder = folder / "transformer"
        config = _diffusers_config(folder)
    tensors = Tensors(_files(folder))
    layout = recognise(tensors.shapes)
    if (layout == "diffusers") != args.src.is_dir():
        raise ValueError(f"src {args.src} has names of {layout}; diffusers' are in a folder, others in a file")
    family = _family(args, layout, tensors.notes)
    if family == "diffusers":
        kind, options = _of_scheduler(args, folder.parent / "scheduler"), _diffusers_settings(args, config)
    else:
        kind, options = _prediction(args, family, layout, tensors), _official_settings(args, family, layout, tensors)
    found = _sizes(tensors, layout, options.pop("num_heads", args.num_heads))
    out = found.pop("out_channels")
    learn_sigma = kind == "epsilon" and out == 2 * found["in_channels"]
    flow = kind == "flow_prediction"
    time = {"time_scale": 1.0} if flow and family != "diffusers" else {}
    settings = {**found, **options, **time, "prediction_type": kind, "learn_sigma": learn_sigma}
    sampler, steps, cfg, channels = _DRAWN["dit-moe-flow" if family == "dit-moe" and flow else family]
    sampler = "flow-euler" if flow else sampler
    names = index.get("id2label") or {}
    if not isinstance(names, dict) or not all(k.isdecimal() and isinstance(v, str) for k, v in names.items()):
        raise ValueError(f"{args.src / 'model_index.json'} has an id2label that is no dict of labels and names")
    return Foreign(
        tensors, layout, family, settings, ObjectiveConfig(prediction_type=kind, learn_sigma=learn_sigma),
        SampleConfig(sampler=sampler, steps=steps, cfg=cfg), channels if found["in_channels"] == 4 else None,
        {int(label): name for label, name in names.items()},
        args.vae or (folder.parent / "vae" if index and (folder.parent / "vae").is_dir() else None),
    )  # fmt: skip


def _files(place: Path) -> list[Path]:
    """The files of weights at a place; what an index lists was looked at by `check_component`."""
    if (place / f"{WEIGHTS}.safetensors.index.json").is_file():
        return weight_files(place)
    for file in (place, place / f"{WEIGHTS}.safetensors", place / f"{WEIGHTS}.bin"):
        if file.is_file():
            return [file]
    raise ValueError(f"src {place} has no {WEIGHTS}.safetensors, no .bin and no index of several files")


def _diffusers_config(folder: Path) -> dict[str, Any]:
    check_component(folder)  # settings and weights alone
    config = read_object(folder / "config.json")
    kinds = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in older folders
    if config.get("_class_name") not in kinds:
        what = f"{folder / 'config.json'} is of {config.get('_class_name')!r:.100}, not {kinds[0]}"
        raise ValueError(f"{what}; a run or a model folder of ours goes out with --to")
    if config.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        raise ValueError(f"{folder / 'config.json'} has activation_fn {config['activation_fn']!r}; ours is gelu's tanh")
    return config


def _diffusers_settings(args: ConvertArgs, config: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes do not tell. Its frequency shift is no setting there, its defaults are those of the class."""
    for flag, value in (("--num-heads", args.num_heads), ("--top-k", args.top_k)):
        require(value is None, f"{flag} does not apply to a diffusers folder, whose config.json says it; leave it out")
    return {
        "num_heads": config.get("num_attention_heads", 16), "sample_size": config.get("sample_size", 32),
        "norm2_eps": config.get("norm_eps", 1e-5), "freq_shift": 1, "qk_norm": "none",
    }  # fmt: skip


def _of_scheduler(args: ConvertArgs, folder: Path) -> PredictionType:
    """What the network beside a saved scheduler predicts. ValueError where its chain is none of ours."""
    if not (folder / "scheduler_config.json").is_file():
        return args.prediction_type or "epsilon"
    config = read_object(folder / "scheduler_config.json")
    flow = "shift" in config and "prediction_type" not in config  # as of diffusers' flow matching
    kind: PredictionType = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    if args.prediction_type not in (None, kind):
        raise ValueError(f"--prediction-type is {args.prediction_type}, but {folder} says {kind}; leave it out")
    usual = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    for name, value in usual.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder} has {name} {config[name]!r:.50}, and DiT's chain has {value}")
    return kind


def _family(args: ConvertArgs, layout: str, notes: Mapping[str, Any]) -> str:
    fits = {"dit": ("dit", "sit"), "diffusers": ("diffusers",)}.get(layout, ("dit-moe",))
    if args.source is not None and args.source not in fits:
        raise ValueError(f"--from is {args.source}, but src {args.src} has names of {' or '.join(fits)}")
    if args.source is not None or len(fits) == 1:
        return args.source or fits[0]
    if "path_type" in notes or str(notes.get("model")).startswith("SiT"):
        return "sit"
    if str(notes.get("model")).startswith("DiT"):
        return "dit"
    raise ValueError(f"src {args.src} may be DiT's or SiT's, which have the same names; add --from dit or --from sit")


def _prediction(args: ConvertArgs, family: str, layout: str, tensors: Tensors) -> PredictionType:
    """What a checkpoint with official names predicts."""
    notes, asked = tensors.notes, args.prediction_type
    if family == "sit":
        path, kind = notes.get("path_type", "Linear"), notes.get("prediction", "velocity")
        if path != "Linear" or kind != "velocity":
            raise ValueError(
                f"src {args.src} has path {path!s:.50} and predicts {kind!s:.50}; only Linear and velocity are ours"
            )
        if asked not in (None, "flow_prediction"):
            raise ValueError(f"--prediction-type is {asked}, but SiT predicts a flow's velocity; leave it out")
        return "flow_prediction"
    if family == "dit":
        if asked == "flow_prediction":
            raise ValueError("--prediction-type flow_prediction does not apply to DiT; a flow with its names is SiT's")
        return asked or "epsilon"
    if asked is not None:
        return asked
    if "rf" in notes:
        return "flow_prediction" if notes["rf"] else "epsilon"
    width, flash = tensors.shapes.get("pos_embed", (0,))[-1], layout == "dit-moe-flash"
    if width not in (_FLOW if flash else _EPSILON):
        raise ValueError(
            f"src {args.src} does not say whether it predicts noise or a flow's velocity; "
            f"add --prediction-type epsilon or flow_prediction"
        )
    return "flow_prediction" if flash else "epsilon"


def _official_settings(args: ConvertArgs, family: str, layout: str, tensors: Tensors) -> dict[str, Any]:
    """What of our settings the sizes of tensors do not tell."""
    settings: dict[str, Any] = {"qk_norm": "layer" if layout == "dit-moe-flash" else "none"}
    if family == "dit-moe":
        top_k = args.top_k or tensors.notes.get("num_experts_per_tok", 2)
        settings |= {
            "top_k": top_k, "activation": "swiglu", "moe_blocks": "all", "router_score": "softmax",
            "router_renormalize": False,
        }  # fmt: skip
    elif args.top_k is not None:
        raise ValueError(f"--top-k is {args.top_k}, but {family} has no experts; leave it out")
    return settings | ({"reverse_time": True} if family == "sit" else {})


def _sizes(tensors: Tensors, layout: str, heads: int | None) -> dict[str, Any]:
    """Our settings that follow from shapes, dense ones being the default, and `out_channels`."""
    numbers = {part[1] for name in tensors.shapes if (part := re.match(r"(?:transformer_)?blocks\.(\d+)\.", name))}

    def shape(ours: str, rank: int) -> tuple[int, ...]:
        name = theirs(ours, layout, 1, 1)[0][0] if ours != "pos_embed" else ours
        found = tensors.shapes.get(name, ())
        if len(found) != rank or 0 in found:
            raise ValueError(f"the checkpoint lacks {name}, or it has another number of axes than {rank}")
        return found

    D, C, p, _ = shape("x_embedder.proj.weight", 4)
    found: dict[str, Any] = {
        "hidden_size": D, "in_channels": C, "patch_size": p, "depth": len(numbers), "positions": "sincos",
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1, "activation": "gelu", "moe_blocks": "none",
    }  # fmt: skip
    rows = shape("final_layer.linear.weight", 2)[0]
    if rows not in (p * p * C, p * p * 2 * C):
        raise ValueError(
            f"the last layer has {rows} rows; for {C} channels and patches of {p} it needs 1 or 2 times {p * p * C}"
        )
    found["out_channels"] = rows // p**2
    if layout != "diffusers":
        T = shape("pos_embed", 3)[1]
        found["sample_size"] = math.isqrt(T) * p
    if tensors.notes.get("num_classes", found["num_classes"]) != found["num_classes"]:
        raise ValueError(
            f"the checkpoint has {found['num_classes'] + 1} labels for num_classes {tensors.notes['num_classes']}; "
            f"without a null label more than there are classes it cannot be used"
        )
    if "moe" in layout:
        found["num_experts"] = shape("blocks.0.moe.router.weight", 2)[0]
        found["expert_width"] = shape("blocks.0.moe.experts.w_out", 2)[1]
        found["shared_width"] = shape("blocks.0.moe.shared.fc2.weight", 2)[1]
    else:
        found["ffn_width"] = shape("blocks.0.mlp.fc1.weight", 2)[0]
    known = D // shape("blocks.0.attn.q_norm.weight", 1)[0] if layout == "dit-moe-flash" else HEADS.get(D)
    if heads is None and known is None:
        raise ValueError(f"the checkpoint does not say how many heads its width {D} has; add --num-heads N")
    if layout == "dit-moe-flash" and heads not in (None, known):
        raise ValueError(f"--num-heads is {heads}, but q_norm is of {known} heads; leave it out")
    return found | {"num_heads": heads or known}

"""The command convert: a checkpoint of others in, a model folder out; or a dense model of ours taken out."""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from .. import pipeline
from ..config.checks import plural, require
from ..config.convert import ConvertArgs
from ..config.sections import Config
from ..data.vae import identity, open_vae
from ..files import read_object, replacing, weight_files
from ..model import DiTMoETransformer2DModel, check_network
from ..model.layers import sincos_positions
from ..pipeline.folder import save_settings
from ..pipeline.handed_in import blank
from .change import change
from .foreign import Foreign, open_foreign
from .give import give
from .tensors import Entry, Tensors, write

SCALING = 0.18215  # latents of the official code are those of Stable Diffusion's VAE times this
VAE = "stabilityai/sd-vae-ft-mse"  # or -ema: a checkpoint does not say
_TABLE = 1e-2  # how far a table of positions may be from ours: what 16 bits leave of sines


def run(args: ConvertArgs) -> None:
    """Write what is asked for, whole or not at all.

    Raises:
        ValueError: The checkpoint or the model does not fit, see `open_foreign` and `give`, or OUT cannot be written.
    """
    require(args.src.exists(), f"src {args.src} does not exist")
    try:
        if args.change:
            change(args)
        elif args.to == "ditmoe":
            _bring(args)
        else:
            give(args)
    except OSError as error:
        raise ValueError(f"out {args.out} cannot be written ({error.strerror or error}); nothing is left") from error


def _bring(args: ConvertArgs) -> None:
    found = open_foreign(args)
    check_network(found.settings)
    net = blank(lambda: DiTMoETransformer2DModel(**found.settings), limit=2 * len(found.tensors.shapes))
    assert isinstance(net, DiTMoETransformer2DModel)
    state = net.state_dict()
    _account(found, state)
    pipe = _pipeline(net, found, args)
    with replacing(args.out) as temporary:
        transformer = save_settings(pipe, temporary)
        write(transformer, [_entry(found, name, tuple(value.shape)) for name, value in state.items()])
        print(f"{args.out}: {_words(found)}", flush=True)
        print(check_forward(transformer), flush=True)
    print(f"wrote {args.out}; python -m ditmoe sample {quote(str(args.out))} --out grid.png draws from it")


def _account(found: Foreign, state: dict[str, Tensor]) -> None:
    """ValueError unless the checkpoint has every tensor that ours are made of, of the right size, and no other."""
    shapes, wanted = found.tensors.shapes, {found.positions}
    for ours, value in state.items():
        copies, shape = found.names(ours), tuple(value.shape)
        if ours.startswith("final_layer.linear"):  # what of it is left out was seen by then
            shape = (shapes[found.names("final_layer.linear.weight")[0][0]][0], *shape[1:])
        if "moe.experts." in ours:
            shape = (shape[0] * shape[1], shape[2])
        needed = (shape[0] // len(copies[0]), *shape[1:])  # of each part
        for name in (name for copy in copies for name in copy):
            wanted.add(name)
            if name not in shapes:
                raise ValueError(f"the checkpoint lacks {name}, of which {ours} is made")
            if shapes[name] != needed:
                raise ValueError(f"{name} has the shape {shapes[name]}, and with the other sizes it must be {needed}")
            if found.tensors.dtypes[name] != found.tensors.dtypes[copies[0][0]]:
                raise ValueError(f"{name} has another precision than {copies[0][0]}; they are parts of one tensor")
    if more := sorted(shapes.keys() - wanted):
        raise ValueError(f"the checkpoint has {', '.join(more[:5])}, which {found.family} has no place for")
    if found.positions in shapes:
        table = found.tensors[found.positions].float()
        side = found.settings["sample_size"] // found.settings["patch_size"]
        fixed = sincos_positions(found.settings["hidden_size"], side)
        if table.shape != fixed.shape or not (table - fixed).abs().max() <= _TABLE:
            raise ValueError(f"{found.positions} is not the table of sines and cosines of DiT, which stays as it is")


def _entry(found: Foreign, name: str, shape: tuple[int, ...]) -> Entry:
    """How a tensor of ours is made of theirs."""
    first, *others = found.names(name)

    def pieces() -> Iterator[Tensor]:
        for at, part in enumerate(first):
            value = found.tensors[part]
            for copy in others:
                if not torch.equal(found.tensors[copy[at]], value):
                    raise ValueError(f"{copy[at]} differs from {part}, and ours has one for all blocks")
            yield _final(found, value) if name.startswith("final_layer.linear") else value

    return Entry(name, found.tensors.dtypes[first[0]], shape, pieces)


def _final(found: Foreign, value: Tensor) -> Tensor:
    """What becomes of the last layer: a variance that nobody reads is left out; SiT's data - noise changes its sign."""
    C, p = found.settings["in_channels"], found.settings["patch_size"]
    kept = C * (2 if found.settings["learn_sigma"] else 1)
    value = value.unflatten(0, (p * p, -1))[:, :kept].flatten(0, 1)
    return -value if found.family == "sit" else value


def _pipeline(net: DiTMoETransformer2DModel, found: Foreign, args: ConvertArgs) -> pipeline.DiTMoEPipeline:
    vae, channels = None, found.settings["in_channels"]
    known, scaling, shift = {"name": VAE, "sha256": ""}, SCALING, 0.0
    if found.vae is not None:
        vae = open_vae(found.vae)
        scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        if vae.config.latent_channels != channels:
            raise ValueError(f"vae {found.vae} makes {vae.config.latent_channels} channels, and the network {channels}")
        if found.family != "diffusers" and (scaling, shift) != (SCALING, 0):
            raise ValueError(f"vae {found.vae} has scaling_factor {scaling}; the official code's has {SCALING}")
        known = identity(vae, found.vae)
    normal = {"vae": known, "mean": [shift] * channels, "std": [1 / scaling] * channels}
    latents = normal if vae is not None or channels == 4 else None
    config = Config(objective=found.objective, sample=found.sample)
    pipe = pipeline.assemble(net, config, found.id2label, latents=latents)
    pipe.register_to_config(guidance_channels=found.channels)
    if vae is not None:
        pipe.register_modules(vae=vae)
    return pipe


def _words(found: Foreign) -> str:
    """The facts that the folder says, for who converts."""
    s = found.settings
    heads = plural(s["num_heads"], "head")
    experts = f", {s['num_experts']} experts, {s['top_k']} of them a token" if "num_experts" in s else ""
    time = {True: "t from noise to data in [0, 1]", False: f"t in 0..{s.get('time_scale', 1000.0):g}"}
    return (
        f"{found.family}, width {s['hidden_size']}, depth {s['depth']}, {heads}{experts}; predicts "
        f"{s['prediction_type']}{' and a variance' if s['learn_sigma'] else ''}, {time[bool(s.get('reverse_time'))]}; "
        f"{plural(s['num_classes'], 'class')}, null label {s['num_classes']}"
    )


@torch.no_grad()
def check_forward(folder: Path) -> str:
    """A sentence on the answer to one image of noise, of the network whose config.json and weights a folder holds.

    It computes with one block in memory at a time, in float32, or for weights of 16 bits in bfloat16. Raises ValueError
    where the answer is not finite.
    """
    tensors, config = Tensors(weight_files(folder)), read_object(folder / "config.json")
    made = blank(lambda: DiTMoETransformer2DModel.from_config(config), limit=2 * len(tensors.shapes))
    assert isinstance(made, DiTMoETransformer2DModel)
    net: Any = made.eval()
    net.pos_embed = sincos_positions(config["hidden_size"], config["sample_size"] // config["patch_size"])
    dtype = torch.float32 if min(kind.itemsize for kind in tensors.dtypes.values()) >= 4 else torch.bfloat16
    names = ["x_embedder", "t_embedder", "y_embedder", "final_layer", *(f"blocks.{i}" for i in range(config["depth"]))]
    for name in names:

        def fill(module: nn.Module, _inputs: Any, prefix: str = f"{name}.") -> None:
            own = {key: tensors[prefix + key].to(dtype) for key in module.state_dict()}
            module.load_state_dict(own, assign=True)

        def empty(module: nn.Module, _inputs: Any, _output: Any) -> None:
            module.to("meta")

        part = net.get_submodule(name)
        part.register_forward_pre_hook(fill)
        part.register_forward_hook(empty)
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = net(x, torch.tensor([500.0]), torch.tensor([0])).sample.float()
    if not y.isfinite().all():
        raise ValueError("the network's answer is not finite: the checkpoint is damaged, or not what it was taken for")
    size = y.square().mean().sqrt()
    return f"a forward pass at t 500 in {str(dtype).removeprefix('torch.')}: finite, root mean square {size:.4g}"

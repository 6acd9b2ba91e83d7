"""A trained model made into another one: what the options of convert ask for."""

from dataclasses import replace
from shlex import quote

import torch
from torch import Tensor

from .. import pipeline
from ..config.convert import ConvertArgs
from ..config.file import save, trained_by
from ..config.presets import PRESETS
from ..config.sections import Config, ObjectiveConfig, SampleConfig
from ..data.open import open_data
from ..files import replacing
from ..model import DiTMoETransformer2DModel, count_parameters
from .centroids import noisy_images
from .domains import check_domains, split_by_domain
from .grow import merge, more
from .lora import load
from .lora import merge as merge_lora
from .prune import Batches, by_chance, check_keep, prune, usage
from .rebuild import dense_layers, described
from .split import split
from .upcycle import upcycle

BATCH = 100  # images of a pass that measures


def change(args: ConvertArgs) -> None:
    """Write the changed model, its training.json, and a line on what became of it.

    Raises:
        ValueError: SRC holds no model of ours, does not say how it was trained, or cannot be changed so.
    """
    pipe = pipeline.load(args.src)
    config, before = _trained_by(args, pipe), pipe.transformer.eval()
    if before.config.expert_storage == "int8":
        raise ValueError(f"{args.src} stores its experts as int8; change the model that it was made of")
    if args.int8:
        return _store_int8(args, pipe, config)
    after, words = _changed(args, before, config)
    onward = described(after, config)
    if onward.moe.domain_weight != config.moe.domain_weight:
        words += "; moe.domain_weight is left out, for the experts of a data set have other numbers now"
    train = replace(config.train, init=args.out.absolute())
    if args.upcycle is not None and train.optimizer == "muon":
        train = replace(train, muon_on="all")
        words += "; Muon moves its experts, as it did the layers that they come from (train.muon_on)"
    pipe.register_modules(transformer=after)
    with replacing(args.out) as temporary:
        pipe.save_pretrained(temporary)
        save(replace(onward, train=train), temporary / "training.json")
    sizes = [f"{n / 1e6:.2f} M" for net in (before, after) for n in count_parameters(net)]
    print(f"{args.src}: {sizes[0]} parameters, {sizes[1]} activated; {args.out}: {sizes[2]}, {sizes[3]}{words}")
    print(f"wrote {args.out}; python -m ditmoe train {quote(str(args.out / 'training.json'))} --out RUN trains it on")


def _store_int8(args: ConvertArgs, pipe: pipeline.DiTMoEPipeline, config: Config) -> None:
    net = pipe.transformer.bfloat16()
    net.store_int8()
    with replacing(args.out) as temporary:
        pipe.save_pretrained(temporary)
        save(config, temporary / "training.json")
    stored = [tensor for name, tensor in net.state_dict().items() if ".experts." in name]
    experts, wide = sum(v.nbytes for v in stored), sum(2 * v.numel() for v in stored if v.dtype == torch.int8)
    print(f"wrote {args.out}; its experts take {experts / 1e6:.2f} MB instead of {wide / 1e6:.2f} MB in bfloat16")


def _trained_by(args: ConvertArgs, pipe: pipeline.DiTMoEPipeline) -> Config:
    """How SRC was trained; of a converted checkpoint, which does not say, how our preset of latents is."""
    measured = args.split is not None or (args.prune is not None and args.by != "random")
    says = [args.src / "config.json", args.src / "training.json", args.src.parent / "config.json"]
    if measured or any(file.is_file() for file in says):
        return trained_by(args.src)
    print(f"note: {args.src} does not say how it was trained; training.json is the preset s and needs --data.path")
    c, drawn = pipe.transformer.config, pipe.config
    objective = ObjectiveConfig(prediction_type=c.prediction_type, learn_sigma=c.learn_sigma)
    sample = SampleConfig(sampler=drawn.sampler, steps=drawn.num_inference_steps, cfg=drawn.guidance_scale)
    return replace(PRESETS["s"], objective=objective, sample=sample)


def _changed(args: ConvertArgs, net: DiTMoETransformer2DModel, config: Config) -> tuple[DiTMoETransformer2DModel, str]:
    """The network, and what is to be said of it."""
    if args.upcycle is not None:
        made = upcycle(
            net, args.upcycle, args.top_k or 2, blocks=args.blocks, copies=args.copies, router_input=args.router_input,
            seed=args.seed,
        )  # fmt: skip
        return made, ", the same function"
    if args.more:
        return more(net, args.seed), ", the same function"
    if args.lora:
        load(net, args.lora)
        merge_lora(net)
        return net, ", the adapter among them"
    if args.merge:
        return merge(net, pipeline.load(args.merge).transformer.eval()), ""
    generator = torch.Generator().manual_seed(args.seed)
    batches = noisy_images(config, net, args.num, generator, BATCH, args.data_path)
    if args.prune is not None:
        check_keep(net, args.prune)
        if args.by == "random":
            return prune(net, args.prune, by_chance(net, args.seed)), ""
        return prune(net, args.prune, getattr(usage(net, batches), args.by)), ""
    assert args.split is not None
    if args.domains is not None:
        return _by_domain(args, net, config, batches)
    found = split(net, args.split, batches, blocks=args.blocks, tau=args.tau, seed=args.seed)
    served = sum(found.served) / len(found.served)
    return found.network, f"; at tau {args.tau:g} {served:.0%} of the experts serve a token"


def _by_domain(
    args: ConvertArgs, net: DiTMoETransformer2DModel, config: Config, batches: Batches
) -> tuple[DiTMoETransformer2DModel, str]:
    assert args.split is not None
    assert args.domains is not None
    dense_layers(net, args.blocks)
    check_domains(net, args.split, args.domains, len(config.data.sets()), args.keep)
    sets = _sets(net, config) if args.domains == "data" else None
    made, domain, known = split_by_domain(
        net, args.split, batches, args.domains, sets=sets, blocks=args.blocks, keep=args.keep, seed=args.seed
    )
    c, by_time = made.config, args.domains == "time"
    for e in () if by_time else range(args.split):
        print(f"expert {e}: labels {' '.join(map(str, (domain == e).nonzero().flatten().tolist()))}")
    units = f"an image has {c.shared_width} shared units and {c.expert_width} of its expert, of {c.ffn_width}"
    return made, f"; {units}; the router knows the expert of {known:.1%} of {'times' if by_time else 'labels'}"


def _sets(net: DiTMoETransformer2DModel, config: Config) -> Tensor:
    """Of every class the data set (C,), of a mixture."""
    data = open_data(config.data, size=net.config.sample_size, channels=net.config.in_channels)
    sets = torch.zeros(net.config.num_classes, dtype=torch.int64)
    sets[torch.from_numpy(data.labels)] = torch.arange(len(data.sizes)).repeat_interleave(torch.tensor(data.sizes))
    return sets

"""The plan of --dry-run: what a run would need on many devices, as a table; the configuration and its counts."""

import json
import math
from bisect import bisect_right
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .. import pipeline
from ..config.file import known, to_dict
from ..config.sections import Config, looks_ahead, micro_batch_size
from ..files import check_component, read_object
from ..model import DiTMoETransformer2DModel, build, count_parameters
from ..pipeline.folder import find
from ..pipeline.handed_in import check_pipeline
from ..training.muon import work as muon_work
from .budget import Way, activations, flops, needs, routed_blocks

USABLE = 0.9  # of a device's memory; the rest is for the driver, the communication library and fragments
_ROWS = (
    "a device, in {}", "parallel.experts", "gradient checkpointing", "weights", "gradients", "optimiser",
    "moving average", "buffers", "activations", "teachers", "peak", "fits", "largest micro-batch",
    "sent a step: all-reduce", "  all-gather, reduce-scatter", "  all-to-all", "seconds a step, arithmetic",
    "  sending, nothing hidden",
)  # fmt: skip


def table(config: Config, model: DiTMoETransformer2DModel, images: int) -> str:
    """The plan as text, for micro-batches of so many images: two columns for each way to use the devices.

    Experts are split over `parallel.experts` devices, or where that is 1 over as many as send least of those that fit,
    or else need least memory. The step's time is its arithmetic alone, at `plan.efficiency`; sending may hide behind.
    """
    plan, count, degrees, times = config.plan, flops(config), _degrees(config), config.train.accumulation
    large = sum(p.numel() for p in model.parameters()) > 1e7
    muon = config.train.optimizer == "muon"  # which FSDP2's slices do not go with
    trunk, whole = (muon_work(model, experts=x)[2] if muon else 0 for x in (False, config.train.muon_on == "all"))
    taught, calls = teaching(config), config.sample.steps if config.distill.few else 1
    frozen, kept = taught.held, taught.kept
    usable, (unit, scale) = USABLE * plan.memory * 1e9 - frozen, ("GB", 1e9) if large else ("MB", 1e6)

    def column(way: Way, degrees: list[int], checkpointing: bool) -> list[str]:
        at = partial(needs, config, model, way)
        found = {d: at(d, calls * images, checkpointing) for d in degrees}
        fitting = [d for d in degrees if found[d].peak + kept * images <= usable]
        d = min(fitting or degrees, key=lambda d: sum(found[d][7:]) if fitting else found[d].peak)
        largest = bisect_right(
            range(1, 2**20), usable, key=lambda size: at(d, calls * size, checkpointing).peak + kept * size
        )
        most = f"{'>' * (largest == 2**20 - 1)}{largest:,}" if largest else "none"
        more = trunk + (whole - trunk) / d  # a device makes its own experts orthogonal
        passes = taught.asked + calls * (count.training(checkpointing) + count.forward * looks_ahead(config))
        work = (times * images * passes + more) / plan.tflops / 1e12
        reduced, *sent = found[d][7:]
        sent = [reduced + taught.sent * 2 * (plan.devices - 1) / plan.devices, *sent]
        seconds = [_cell(x, 4) for x in (work / plan.efficiency, sum(sent) / plan.bandwidth / 1e9)]
        *own, peak = found[d][:7]
        others = frozen + kept * images
        sizes = [_cell(size / scale) for size in (*own, others, peak + others, *sent)]
        return [way, str(d), _cell(checkpointing), *sizes[:8], _cell(bool(fitting)), most, *sizes[8:], *seconds]

    precision = "fp32" if config.train.precision == "fp32" else "bf16 autocast"
    whole_alone = muon or config.distill.fake_steps > 0
    rests: tuple[Way, ...] = ("DDP", "FSDP2") if plan.devices > 1 and not whole_alone else ("DDP",)
    splits = [[1], degrees] if not config.distill.fake_steps else [[1]]
    columns = [column(way, some, again) for some in splits if some for way in rests for again in (False, True)]
    head = (
        f"plan (a calculation, not a run): {plan.devices} devices of {plan.memory:g} GB ({USABLE:.0%} usable), "
        f"{plan.tflops:g} TFLOP/s at {plan.efficiency:.0%}, {plan.bandwidth:g} GB/s\n"
        f"micro-batches of {images}, accumulation {times}, {precision}, "
        f"FSDP2 gathers {config.parallel.gather}\n"
        f"{count.forward / 1e9:.2f} GFLOP an image forward, {count.training(False) / 1e9:.2f} in training, "
        f"{count.training(True) / 1e9:.2f} with gradient checkpointing"
        + f"; Muon {whole / 1e9:.3g} a step more" * muon
        + taught.said
    )
    rows = [row for row in zip(_ROWS, *columns, strict=True) if frozen or row[0] != "teachers"]
    return "\n".join([head, *(f"{name.format(unit):28}" + "".join(f"{x:>11}" for x in row) for name, *row in rows)])


class Teaching(NamedTuple):
    """What teachers, and a fake, add on every device."""

    held: float = 0.0  # bytes
    kept: float = 0.0  # bytes for each image of a micro-batch
    asked: float = 0.0  # operations for each image
    sent: float = 0.0  # bytes of gradients that all devices get the mean of
    said: str = ""


def teaching(config: Config) -> Teaching:
    """What the teachers of a run add.

    Their weights and their guides' are there whole, see `_held`. Those that are guided are taken to be so at all times,
    by a guide as costly as they are. An image of a mixture has the teacher of its set where `distill.by` is domain. Of
    distribution matching there is a fake beside them: a copy with gradients and moments, which learns from every image.
    """
    distill, sets, held, weights, asked, lacking = config.distill, config.data.sets(), 0.0, 0, 0.0, ""
    kept = sent = 0.0
    for number, folder in enumerate(distill.teachers):
        index = check_pipeline(place := find(Path(folder)))
        parts = [place / part for part in ("transformer", "guide") if any(index.get(part, ()))]
        for values, size in map(_held, parts):
            weights, held = weights + values, held + size
        passes = max(1, distill.teacher_steps)
        if distill.guided or distill.teacher_steps:
            labelled = bool(read_object(parts[0] / "config.json").get("num_classes"))
            guide = len(parts) > 1 or bool(index.get("experts_off"))
            scale = index.get("guidance_scale", 1) if distill.cfg is None else distill.cfg
            w = index.get("guide_scale") if distill.guide_scale is None else distill.guide_scale
            passes *= 1 + (labelled and scale != 1) + (guide and w != 1)
        share = sets[number][1] / sum(weight for _, weight in sets) if distill.by == "domain" else 1
        if distill.fake_steps:
            copied = _held(parts[0])[1]
            held, sent = held + 4 * copied, distill.fake_steps * copied
        if (own := known(Path(folder))) is None:
            lacking += f", without those of {folder}, which does not say how it was trained"
            continue
        count, again = flops(own), config.model.gradient_checkpointing
        asked += share * passes * count.forward
        if distill.fake_steps:
            asked += count.forward + distill.fake_steps * count.training(again)
            fake = replace(own, train=replace(own.train, precision=config.train.precision))
            kept = sum(activations(fake, routed)[0] for routed in routed_blocks(fake))
    learns = " and a copy that learns" if distill.fake_steps else ""
    said = f"\nteachers: {weights / 1e6:.2f} M parameters{learns}, {asked / 1e9:.2f} GFLOP an image{lacking}"
    if distill.few:
        said += f"; an image is {config.sample.steps} to the student, one for each of its steps"
    return Teaching(held, kept, asked, sent, said) if distill.teachers else Teaching()


def _held(part: Path) -> tuple[int, int]:
    """Parameters of the network in a folder, and the bytes that they take once loaded: float32, or as int8 experts."""
    int8 = read_object(part / "config.json").get("expert_storage") == "int8"
    sizes = {name: math.prod(shape) for name, shape in check_component(part).items()}
    small = sum(n for name, n in sizes.items() if int8 and name.endswith((".experts.w_in", ".experts.w_out")))
    scales = sum(n for name, n in sizes.items() if name.endswith(("w_in_scale", "w_out_scale")))
    return sum(sizes.values()) - scales, 4 * sum(sizes.values()) - 3 * small


def _degrees(config: Config) -> list[int]:
    """Over how many devices experts may be split. ValueError where `parallel` asks for what cannot be."""
    n, E, asked = config.plan.devices, config.moe.num_experts, config.parallel.experts
    if n % asked or E % asked:
        raise ValueError(f"parallel.experts {asked} must divide plan.devices {n} and moe.num_experts {E}")
    if config.parallel.shard and n == 1:
        raise ValueError("parallel.shard needs several devices, but plan.devices is 1")
    if config.parallel.gather == "bfloat16" and config.train.precision == "fp32":
        raise ValueError("parallel.gather bfloat16 needs --train.precision bf16, not fp32")
    common = math.gcd(n, E) if any(routed_blocks(config)) and config.moe.experts == "stacked" else 1
    return [asked] if asked > 1 else [d for d in range(2, common + 1) if common % d == 0]


def _cell(value: float, digits: int = 3) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.{digits}f}"
    if 0 < value < 10.0 ** (1 - digits):
        return f"{value:.1e}"
    return text if len(text) <= 10 else f"{value:.3e}"


def describe(config: Config) -> str:
    """The configuration as JSON and the parameter counts; allocates nothing, reads no images."""
    with torch.device("meta"):
        classes = [{"digits": 10, "fashion": 10}.get(part.name, 0) for part, _ in config.data.sets()]
        known = sum(classes) if all(classes) else 0
        model = build(config, known if config.model.num_classes is None else config.model.num_classes)
    pipeline.assemble(model, config, {})  # what the samplers refuse is refused here too
    total, activated = count_parameters(model)
    counts = f"{total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M activated by a token"
    if config.model.num_classes is None and not known:
        counts += ", without the label table, whose size the data set decides"
    if config.plan.devices:
        counts += "\n" + table(config, model, micro_batch_size(config.train, config.plan.devices))
    return json.dumps(to_dict(config), indent=2) + "\n" + counts

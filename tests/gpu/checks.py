"""What an accelerator alone can show: bf16, speed, waits of the host, memory. Tiny, each check runs on a CPU too.

A check takes (device, size) and gives rows: what was looked at, what was found, what is wanted and whether that is so.
On a CPU times are shown and anything is good; all else is held to the same. Training runs on the best device there is.
"""

import gc
import traceback
import warnings
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import plan_check
from benchmarks.timing import round_robin
from benchmarks.train_step import prepared
from ditmoe import pipeline
from ditmoe.config.sections import Config, ObjectiveConfig, SampleConfig
from ditmoe.generate.draw import balanced_labels
from ditmoe.model import build
from ditmoe.moe import FeedForward, MoELayer, RoutingRule
from ditmoe.training.loop import open_images, train
from eval.fid import score
from tests.ditmoe.analysis.test_budget import a_block_and_an_image, saved_by_two, saved_bytes

ROOT = Path(__file__).parents[2]
# What a training step may wait for, by file: t, noise and labels of a micro-batch go to the device, and whether all of
# the step was finite comes back.
STATED = Counter({"step.py": 3, "health.py": 1})
DIGITS_FID = 0.0591079  # of the first 500 training digits to the test digits, on a CPU

Row = namedtuple("Row", "what found wanted good")  # three sentences for the table, and whether the check holds
# tokens of a layer, experts E, width D, images of a step (64 tokens each), images drawn and their sampling steps
Size = namedtuple("Size", "tokens experts width depth batch num steps rounds")
TINY = Size(tokens=96, experts=4, width=32, depth=2, batch=4, num=6, steps=3, rounds=1)
REAL = Size(tokens=32768, experts=16, width=512, depth=12, batch=256, num=512, steps=20, rounds=10)


def _config(device: torch.device, size: Size, *, experts: bool = True) -> Config:
    """Digits in tokens of one pixel, bf16 but on a CPU; the dense twin is as wide as the K + 1 experts of a token."""
    case = plan_check.case(size.width, size.depth, size.batch, experts=size.experts if experts else 0)
    return replace(
        case,
        moe=replace(case.moe, bias_rate=0.001),
        objective=ObjectiveConfig(prediction_type="flow_prediction"),
        train=replace(case.train, warmup_steps=1, precision="fp32" if device.type == "cpu" else "bf16"),
        sample=SampleConfig(sampler="flow-euler"),
    )


def _speed(device: torch.device, what: str, ours: float, theirs: float, least: float) -> Row:
    """How much of the rival's speed we have, from both's seconds."""
    found = f"{theirs / ours:.2f} ({ours * 1e3:.3g} ms, {theirs * 1e3:.3g} ms)"
    timed = device.type != "cpu"
    return Row(what, found, f"at least {least:g}" if timed else "", not timed or theirs / ours >= least)


def _apart(what: str, a: Tensor | float, b: Tensor | float, limit: float) -> Row:
    a, b = (torch.as_tensor(x).float() for x in (a, b))
    apart = float((a - b).norm() / b.norm())
    return Row(f"{what}: relative distance", f"{apart:.2g}", f"at most {limit:g}", apart <= limit)


def check_layer(device: torch.device, size: Size) -> list[Row]:
    """In bf16 with grouped products: as fast as a dense layer of width K F; alike, experts do what one does."""
    torch.manual_seed(0)
    D, F, E, rule = size.width, 2 * size.width, size.experts, RoutingRule(2, renormalize=True)
    moe = MoELayer(D, num_experts=E, expert_width=F, shared_width=0, rule=rule, backend="grouped")
    nn.init.normal_(moe.router.weight, std=D**-0.5)
    moe.to(device, torch.bfloat16)
    dense, twin = (FeedForward(D, K * F, "swiglu").to(device, torch.bfloat16) for K in (1, 2))
    x, g = (torch.randn(1, size.tokens, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def forward(layer: nn.Module) -> Tensor:
        y: Any = layer(x)
        return y if isinstance(y, Tensor) else y[0]

    def both(layer: nn.Module, *weights: Tensor) -> list[Tensor]:
        y = forward(layer)
        return [y.detach(), *torch.autograd.grad(y, [x, *(weights or layer.parameters())], g)]

    rows = []
    for way, run in (("forward", torch.no_grad()(forward)), ("forward and backward", both)):
        t = round_robin({"experts": partial(run, moe), "dense": partial(run, twin)}, size.rounds)
        rows.append(_speed(device, f"{way}, of a dense layer's speed", t["experts"], t["dense"], 0.33))
    with torch.no_grad():
        moe.experts.w_in.copy_(dense.fc1.weight.expand_as(moe.experts.w_in))
        moe.experts.w_out.copy_(dense.fc2.weight.expand_as(moe.experts.w_out))
    got, wanted = both(moe, moe.experts.w_in, moe.experts.w_out), both(dense, dense.fc1.weight, dense.fc2.weight)
    got[2:] = [grad.float().sum(0) for grad in got[2:]]
    names = ("output", "gradient of x", "gradient of w_in", "gradient of w_out")
    return rows + [_apart(f"{n} and the dense layer's", a, b, 0.02) for n, a, b in zip(names, got, wanted, strict=True)]


def check_step(device: torch.device, size: Size) -> list[Row]:
    """The whole training step beside the dense twin's."""
    steps = {name: prepared(_config(device, size, experts=name == "experts"))[0] for name in ("experts", "dense")}
    times = round_robin(steps, size.rounds)
    rows = [Row(f"images/s, {name}", f"{size.batch / seconds:.0f}", "", True) for name, seconds in times.items()]
    return [*rows, _speed(device, "of the dense twin's speed", times["experts"], times["dense"], 0.5)]


class _Items(TorchDispatchMode):
    """Counts, by files of ditmoe, values taken off the device, as far as a CPU tells (`tolist` it does not)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = (Path(frame.filename) for frame in reversed(traceback.extract_stack()))
            self.found[next((path.name for path in frames if path.is_relative_to(ROOT / "ditmoe")), "torch")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """How often the host waits for the device, by the name of the file where it does."""
    items, cuda = _Items(), device.type == "cuda"
    items.found = Counter[str]()
    with warnings.catch_warnings(record=cuda) as caught, nullcontext() if cuda else items:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield items.found
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    items.found.update(Path(w.filename).name for w in caught or () if "called a synchronizing" in str(w.message))


def check_waits(device: torch.device, size: Size) -> list[Row]:
    """A training step waits where it is stated, and nowhere else."""
    step = prepared(_config(device, size))[0]
    step()
    with waits(device) as found:
        step()
    said, wanted = (", ".join(f"{place} {n}" for place, n in sorted(x.items())) for x in (found, STATED))
    return [Row("the host waits in a step, by file", said, f"at most {wanted}", found <= STATED)]


def check_memory(device: torch.device, size: Size) -> list[Row]:
    """What autograd keeps, and on an accelerator the most that three steps allocate, beside the planner."""
    config = _config(device, size)

    def kept(depth: int, images: int) -> int:
        model = build(replace(config, model=replace(config.model, depth=depth)), 10).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            return saved_bytes(model, images, str(device))

    found, planned = a_block_and_an_image(kept), saved_by_two(config)
    rows = [_apart(f"{found / 1e3:.0f} kB kept of an image in two blocks, and the plan", found, planned, 0.02)]
    if device.type in ("cuda", "xpu"):
        gc.collect()  # what other checks left
        torch.accelerator.empty_cache()
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        step = prepared(config)[0]
        for _ in range(3):
            step()
        peak, planned = torch.accelerator.max_memory_allocated() - before, plan_check.predicted(config).peak
        rows.append(_apart(f"{peak / 1e6:.0f} MB at the peak of three steps, and the plan", peak, planned, 0.15))
    return rows


def check_sampling(device: torch.device, size: Size) -> list[Row]:
    """Pictures of the Fashion-MNIST model in bf16, and in bf16 compiled, beside float32's."""
    pipe = pipeline.load(ROOT / "models" / "fashion").to(device)
    pipe.set_progress_bar_config(disable=True)
    labels, rows, images = balanced_labels(pipe, size.num), [], {}

    def draw(way: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=way != "float32"):
            images[way] = pipe(labels, num_inference_steps=size.steps, output_type="pt").images

    for way in ("float32", "bf16", "bf16 compiled"):
        for block in pipe.transformer.blocks if way == "bf16 compiled" else ():
            block.compile(dynamic=False, backend="eager" if device.type == "cpu" else "inductor")
        seconds = round_robin({way: partial(draw, way)}, 1)[way]
        rows.append(Row(f"{way}, images/s", f"{size.num / seconds:.0f}", "", True))
    wanted = images.pop("float32")
    return rows + [_apart(f"{way} and float32", x, wanted, 0.05) for way, x in images.items()]


def check_resume(device: torch.device, size: Size) -> list[Row]:
    """Four steps, and two and two: the same bits. Attention in plain products: fused gradients may vary alone."""
    config, found = _config(device, size), []
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), sdpa_kernel(SDPBackend.MATH):
        for stops in ([4], [2, 4]):
            for stop in stops:
                run = replace(config, out=Path(folder) / str(stops), max_steps=stop)
                train(run, open_images(run))
            files = sorted((run.out / "checkpoints" / "step-000004").glob("*.safetensors"))
            found.append({f"{file.name} {key}": v for file in files for key, v in load_file(file).items()})
    other = [key for key in found[0].keys() | found[1].keys() if not torch.equal(found[0][key], found[1][key])]
    said = f"{len(other)} of {len(found[0])}"
    return [Row("tensors of step 4, resumed at step 2, that differ", said, "0", bool(found[0]) and not other)]


def check_fid(device: torch.device, size: Size) -> list[Row]:
    """500 digits beside the test digits: the score of a CPU."""
    scores: list[float] = []
    seconds = round_robin({"fid": lambda: scores.append(score("digits:train", "digits:test", num=500)["value"])}, 1)
    wanted, good = f"{DIGITS_FID:g} within 0.1%", abs(scores[-1] - DIGITS_FID) <= 1e-3 * DIGITS_FID
    return [Row("FID of 500 digits", f"{scores[-1]:.6g} in {seconds['fid']:.2g} s", wanted, good)]


CHECKS: dict[str, Callable[[torch.device, Size], list[Row]]] = {
    check.__name__.removeprefix("check_"): check
    for check in (check_layer, check_step, check_waits, check_memory, check_sampling, check_resume, check_fid)
}

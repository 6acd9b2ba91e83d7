"""The torchmetrics classes: the figures of `score`, of torchmetrics itself, of one process and of two."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.wrappers import FeatureShare

from eval.fid import score
from eval.metrics import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecallDensityCoverage, modules
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.inception_score import InceptionSums
from eval.metrics.kid import kernel_distance
from eval.networks.extractors import Extractor, Features, load_extractor
from tests.processes import start

SETS = [FrechetDistance, KernelDistance, PrecisionRecallDensityCoverage]


def pixels(array):
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


@pytest.fixture(scope="module")
def sides(digits):
    """450 generated digits, which are real ones, and 450 others."""
    return digits[0][:450], digits[0][450:900]


@pytest.fixture(scope="module")
def expected(sides):
    return {
        name.replace("_random_conv_v1", "").replace("kid", "kernel_distance"): value
        for name, value in score(*sides, metrics=["kid", "prdc"])["scores"].items()
    }


def fed(metric, sides, batch=64, order=slice(None)):
    """A metric that has seen both sides."""
    for images, real in zip(sides, (False, True), strict=True):
        for part in pixels(images[order]).split(batch):
            metric.update(part, real=real)
    return metric


def figures(metric):
    """What a metric comes to, under the names of a report."""
    found = metric.compute()
    found = found if isinstance(found, dict) else {"fd": found}
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in found.values())
    return {name: float(value) for name, value in found.items()}


def states(metric):
    """Copies, each one tensor."""
    held = metric.metric_state.values()
    return [torch.cat([torch.empty(0), *state]) if isinstance(state, list) else state.clone() for state in held]


def agree(found, expected, rel=1e-9):
    assert found.keys() <= expected.keys()
    assert found == pytest.approx({name: expected[name] for name in found}, rel=rel, abs=1e-12)


# ------------------------------------------------------------------------- the value


@pytest.mark.parametrize("kind", SETS)
def test_the_figures_are_those_of_score(kind, sides, expected):
    agree(figures(fed(kind(load_extractor("random-conv-v1")), sides)), expected)


def test_the_distance_is_that_of_torchmetrics(sides):
    fid = pytest.importorskip("torchmetrics.image.fid")
    net = load_extractor("random-conv-v1")
    theirs = fed(fid.FrechetInceptionDistance(feature=net), sides)
    agree(figures(fed(FrechetDistance(net), sides)), {"fd": float(theirs.compute())}, rel=1e-5)


@pytest.mark.parametrize("kind", SETS)
def test_batches_and_order_do_not_matter(kind, sides, expected):
    net = load_extractor("random-conv-v1")
    agree(figures(fed(kind(net), sides, 7, slice(None, None, -1))), expected, rel=1e-6)


def test_subsets_are_drawn_from_images_in_the_order_of_their_hash(sides, monkeypatch):
    monkeypatch.setattr(modules, "kernel_distance", partial(kernel_distance, subset_size=100))
    net = load_extractor("random-conv-v1")
    rows = []
    for images in sides:
        coloured = images.repeat(3, axis=3).transpose(0, 3, 1, 2)
        hashes = [hashlib.sha256(b"\0\0\0\x05" + image.tobytes()).hexdigest()[:12] for image in coloured]
        rows.append(net(pixels(images))[np.argsort(hashes)[:300]].numpy())
    expected = kernel_distance(*rows, subset_size=100)._asdict()
    metric = KernelDistance(net, keep=300, seed=5)
    found = figures(fed(metric, sides, 450))
    agree(found, {"kernel_distance": expected["mean"], "kernel_distance_std": expected["std"]})
    assert expected["std"] > 1e-5


@pytest.mark.parametrize("kind", SETS[1:])
def test_the_images_that_are_kept_depend_on_the_images_alone(kind, sides):
    net = load_extractor("random-conv-v1")
    found = [
        figures(fed(kind(net, keep=50, seed=seed), sides, batch, slice(None, None, step)))
        for seed, batch, step in ((0, 500, 1), (0, 9, -1), (1, 9, 1))
    ]
    agree(found[0], found[1], rel=1e-4)  # features themselves change in their last digits with the batch
    assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_memory_does_not_grow_with_the_images(sides):
    metric = fed(KernelDistance(load_extractor("random-conv-v1"), keep=50), sides, 25)
    for side in (metric.generated, metric.real):
        assert sum(map(len, side)) <= 2 * 50 * 258


class Far(torch.nn.Module):
    """Some pixels around 1e6: sums that are not shifted keep no digit of their variance of 1e-4."""

    num_features = 4

    def forward(self, images):
        return 1e6 + 0.01 * images.double().flatten(1)[:, 20:24] / 16


def test_features_far_from_zero_keep_their_digits(sides):
    x, y = (Far()(pixels(images)).numpy() for images in sides)
    got = fed(FrechetDistance(Far()), sides, 50).compute()
    moments = [Gaussian(f.mean(0), np.cov(f - f.mean(0), rowvar=False)) for f in (x, y)]
    assert float(got) == pytest.approx(frechet_distance(*moments), rel=1e-4)


def test_features_that_are_shared_are_left_alone(sides):
    kinds = [FrechetDistance, PrecisionRecallDensityCoverage]
    shared = fed(FeatureShare([kind(Far()) for kind in kinds]), sides).compute()
    for kind in kinds:
        for name, value in figures(fed(kind(Far()), sides)).items():
            assert float(shared["FrechetDistance" if name == "fd" else name]) == value


def test_a_callers_autocast_changes_nothing(sides, expected):
    with torch.autocast("cpu", torch.bfloat16):
        metric = fed(FrechetDistance(load_extractor("random-conv-v1")), sides)
    agree(figures(metric), expected)


def test_grey_images_are_their_copies_in_three_channels(sides):
    net = load_extractor("random-conv-v1")
    grey = figures(fed(KernelDistance(net, keep=50), sides))
    agree(figures(fed(KernelDistance(net, keep=50), [s.repeat(3, axis=3) for s in sides])), grey, rel=1e-4)


# --------------------------------------------------------- as torchmetrics uses them


class Logits(torch.nn.Module):
    """Ten classes from the first ten random features."""

    def __init__(self):
        super().__init__()
        self.net = load_extractor("random-conv-v1")

    def forward(self, images):
        return 20 * self.net(images)[:, :10]


class WithLogits(Extractor):
    def features(self, images):
        return Features(super().features(images).pool, None, 20 * super().features(images).pool[:, :10])


def every_figure(sides, rank=0, world=1, batch=32):
    """All metrics of every world-th batch."""
    net, found = load_extractor("random-conv-v1"), {}
    metrics = [FrechetDistance(net), KernelDistance(net), KernelDistance(net, keep=60)]
    metrics += [PrecisionRecallDensityCoverage(net)]
    inception = InceptionScore(Logits(), 10)
    for images, real in zip(sides, (False, True), strict=True):
        for part in pixels(images).split(batch)[rank::world]:
            for metric in metrics:
                metric.update(part, real)
            if not real:
                inception.update(part)
    for i, metric in enumerate(metrics):
        found |= {f"{name} {i}": value for name, value in figures(metric).items()}
    return found | {"inception": float(inception.compute())}


def share_the_work(file, out, batch):
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    torch.distributed.init_process_group("gloo")
    with np.load(file) as sides:
        found = every_figure([sides["generated"], sides["real"]], rank, world, batch)
    (Path(out) / f"{rank}.json").write_text(json.dumps(found | {"world": torch.distributed.get_world_size()}))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("batch", [32, 512])  # of 512: the second process sees nothing
def test_two_processes_come_to_what_one_does(tmp_path, sides, batch):
    np.savez(tmp_path / "sides.npz", generated=sides[0], real=sides[1])
    group = start(share_the_work, tmp_path / "sides.npz", tmp_path, batch, folder=tmp_path / "log", world=2)
    assert group.wait() == [0, 0], group.err() + group.err(1)
    alone = every_figure(sides, batch=batch)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.pop("world") == 2
        assert found.keys() == alone.keys()
        agree(found, alone)


@pytest.mark.parametrize("kind", SETS)
def test_reset_forgets_and_can_keep_the_real_side(kind, sides, expected):
    net = load_extractor("random-conv-v1")
    metric = fed(kind(net), (sides[1][:50], sides[0][:50]))
    metric.reset()
    agree(figures(fed(metric, sides)), expected)
    metric = fed(kind(net, reset_real_features=False), (sides[0][:50], sides[1]))
    metric.reset()
    for part in pixels(sides[0]).split(64):
        metric.update(part, real=False)
    agree(figures(metric), expected)


@pytest.mark.parametrize("kind", SETS)
def test_states_of_two_metrics_can_be_merged(kind, sides, expected):
    net = load_extractor("random-conv-v1")
    first, second = fed(kind(net), [s[:100] for s in sides]), fed(kind(net), [s[100:] for s in sides])
    first.merge_state(second)
    agree(figures(first), expected, rel=1e-6)


def test_a_collection_runs_the_extractor_once(sides, expected, monkeypatch):
    seen, forward = [], Extractor.features
    monkeypatch.setattr(Extractor, "features", lambda net, x: (seen.append(len(x)), forward(net, x))[1])
    net = load_extractor("random-conv-v1")
    found = fed(FeatureShare([kind(net) for kind in SETS]), sides).compute()
    assert sum(seen) == 900
    agree({name: float(v) for name, v in found.items()}, expected | {"FrechetDistance": expected["fd"]})
    found = fed(MetricCollection([kind(net) for kind in SETS]), sides).compute()
    agree({name: float(v) for name, v in found.items()}, expected | {"FrechetDistance": expected["fd"]})


def test_the_extractor_stays_in_evaluation_mode(sides, expected):
    class Dropping(torch.nn.Module):
        num_features = 256

        def __init__(self):
            super().__init__()
            self.net, self.drop = load_extractor("random-conv-v1"), torch.nn.Dropout(0.5)

        def forward(self, images):
            return self.drop(self.net(images))

    holder = torch.nn.Module()
    holder.metric = FrechetDistance(Dropping())
    holder.train()
    agree(figures(fed(holder.metric, sides)), expected)
    assert not holder.metric.real.requires_grad


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("kind", SETS)
def test_forward_is_refused_and_changes_nothing(kind, resets, sides, expected):
    metric = fed(kind(load_extractor("random-conv-v1"), reset_real_features=resets), sides)
    for real in (False, True):
        with pytest.raises(ValueError, match="call update, then compute: a batch of one side has no distance"):
            metric(pixels(sides[0][:64]), real=real)
    agree(figures(metric), expected)


class Trained(torch.nn.Module):
    """An ordinary network, whose parameters ask for gradients."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 4)

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.linear(images.flatten(1).float())


@pytest.mark.parametrize("kind", SETS)
def test_a_network_that_asks_for_gradients_runs_without_them(kind, sides):
    metric = kind(Trained())
    metric._enable_grad = True  # as within a forward of torchmetrics
    figures(fed(metric, sides))
    assert not any(state.requires_grad for state in states(metric))


def test_forward_of_the_inception_score_gives_the_batch_s_and_goes_on(sides):
    net = Trained()
    metric, whole, part = (InceptionScore(net, 4) for _ in range(3))
    for images in pixels(sides[0]).split(225):
        part.reset()
        part.update(images)
        whole.update(images)
        assert float(metric(images)) == float(part.compute())
    assert float(metric.compute()) == pytest.approx(float(whole.compute()), rel=1e-12)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, lambda module: module.to(torch.bfloat16)])
@pytest.mark.parametrize("kind", SETS)
def test_a_parent_of_less_precision_changes_nothing(kind, convert, sides, expected):
    holder = torch.nn.Module()
    holder.metric = fed(kind(load_extractor("random-conv-v1")), [s[:200] for s in sides])
    convert(holder)
    agree(figures(fed(holder.metric, [s[200:] for s in sides])), expected, rel=1e-6)


@pytest.mark.parametrize("real", [-1, 2, np.True_])
@pytest.mark.parametrize("kind", SETS)
def test_real_is_a_yes_or_no(kind, real, sides):
    metric = kind(load_extractor("random-conv-v1"))
    metric.update(pixels(sides[0][:4]), real=real)
    generated, held = states(metric)
    assert held.any()
    assert not generated.any()


def raise_and_go_on(file):
    """Where every process has too few images: `compute` raises, update goes on, reset forgets what was joined."""
    torch.distributed.init_process_group("gloo")
    with np.load(file) as sides:
        generated, real = (pixels(sides[side])[torch.distributed.get_rank() :: 2] for side in ("generated", "real"))
    net = load_extractor("random-conv-v1")
    for metric in [*(kind(net, reset_real_features=False) for kind in SETS), InceptionScore(Logits(), 10)]:
        two = not isinstance(metric, InceptionScore)
        if two:
            metric.update(real, real=True)
        before = states(metric)
        for _ in range(2):
            with pytest.raises(ValueError, match="0 (generated )?images|got 0 and"):
                metric.compute()
            assert all(map(torch.equal, states(metric), before))
        metric.update(generated, *[False] * two)
        metric.compute()
        metric.sync()
        metric.reset()
        assert all(map(torch.equal, states(metric)[two:], before[two:]))
        assert not two or not states(metric)[0].any()
    torch.distributed.destroy_process_group()


def test_a_compute_that_raises_in_two_processes_leaves_the_metric_alive(tmp_path, sides):
    np.savez(tmp_path / "sides.npz", generated=sides[0], real=sides[1])
    group = start(raise_and_go_on, tmp_path / "sides.npz", folder=tmp_path / "log", world=2)
    assert group.wait() == [0, 0], group.err() + group.err(1)


# ------------------------------------------------------------------ Inception Score


def test_the_inception_score_is_that_of_one_split(sides):
    net, metric = Logits(), InceptionScore(Logits(), 10)
    for part in pixels(sides[0]).split(64):
        metric.update(part)
    sums = InceptionSums(450, 10)
    sums.update(np.arange(450), net(pixels(sides[0])).detach().numpy())
    assert float(metric.compute()) == pytest.approx(sums.compute().mean, rel=1e-6)
    assert 1.0001 < float(metric.compute()) < 10
    value = metric.compute()
    metric.reset()
    metric.update(pixels(sides[0]))
    assert float(metric.compute()) == pytest.approx(float(value), rel=1e-6)


def test_an_extractor_gives_its_logits_and_one_without_is_refused(sides):
    net = load_extractor("random-conv-v1")
    with pytest.raises(ValueError, match="random-conv-v1 has no logits, which the Inception Score needs"):
        InceptionScore(net).update(pixels(sides[0][:4]))
    net.__class__ = WithLogits
    metric = InceptionScore(net, 10)
    metric.update(pixels(sides[0]))
    other = InceptionScore(Logits(), 10)
    other.update(pixels(sides[0]))
    assert float(metric.compute()) == pytest.approx(float(other.compute()), rel=1e-9)
    with pytest.raises(ValueError, match=r"logits have shape \(4, 10\); expected \(N, 1008\)"):
        InceptionScore(net).update(pixels(sides[0][:4]))


# ------------------------------------------------------------------------- refusals


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("seen", [None, True, False])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (SETS[0], "{few} {side} images have no covariance; give at least 2"),
        (SETS[1], "a kernel distance needs at least 2 images a side, got"),
        (SETS[2], "{few} {side} images have no"),
    ],
)
def test_a_side_without_enough_images_is_one_sentence(kind, sentence, seen, sides):
    metric = kind(load_extractor("random-conv-v1"))
    if seen is not None:
        metric.update(pixels(sides[0][:20]), real=seen)
        metric.update(pixels(sides[0][:1]), real=not seen)
    few, side = ("0", "(real|generated)") if seen is None else ("1", "generated" if seen else "real")
    with pytest.raises(ValueError, match=sentence.format(few=few, side=side)):
        metric.compute()
    if seen is not None:
        fed(metric, sides).compute()  # goes on


def test_no_images_have_no_inception_score():
    with pytest.warns(UserWarning, match="before the ``update`` method"), pytest.raises(ValueError, match="0 images"):
        InceptionScore(Logits(), 10).compute()


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
)
@pytest.mark.parametrize("kind", [*SETS, InceptionScore])
def test_images_of_another_type_or_shape_are_refused_and_change_nothing(kind, images, sides):
    metric = kind(Logits(), 10)
    real = () if kind is InceptionScore else (True,)
    with pytest.raises(ValueError, match=r"images are .*; expected uint8 \(N, 1 or 3, H, W\)"):
        metric.update(images, *real)
    assert all(len(s) == 0 if isinstance(s, list) else not s.any() for s in metric.metric_state.values())


@pytest.mark.parametrize("kind", SETS)
def test_features_that_do_not_fit_are_refused(kind, sides, monkeypatch):
    images = pixels(sides[0][:4])
    with pytest.raises(ValueError, match="num_features None of Logits must be >= 1; give num_features"):
        kind(Logits())
    with pytest.raises(ValueError, match="num_features 0 of Extractor must be >= 1; give num_features"):
        kind(load_extractor("random-conv-v1"), 0)
    with pytest.raises(ValueError, match=r"features have shape \(4, 10\); expected \(N, 11\)"):
        kind(Logits(), 11).update(images, real=True)
    monkeypatch.setattr(Logits, "forward", lambda _, x: torch.full((len(x), 10), torch.nan))
    with pytest.raises(ValueError, match="features hold NaN or infinity"):
        kind(Logits(), 10).update(images, real=True)


@pytest.mark.parametrize("options", [{"keep": 1}, {"seed": -1}, {"seed": 2**32}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"keep \d+ must be at least 2 and seed -?\d+ between 0 and 4294967295"):
        KernelDistance(Logits(), 10, **options)


def test_an_empty_batch_changes_nothing(sides, expected):
    metric = fed(FrechetDistance(load_extractor("random-conv-v1")), sides)
    metric.update(torch.empty(0, 1, 8, 8, dtype=torch.uint8), real=True)
    agree(figures(metric), expected)


def test_torch_comes_with_the_classes_and_not_before():
    code = (
        "import sys, eval.metrics, eval.metrics.frechet, eval.metrics.kid\n"
        "assert 'torch' not in sys.modules\n"
        "from eval.metrics import KernelDistance\n"
        "assert 'torchmetrics' in sys.modules and KernelDistance.__name__ == 'KernelDistance'\n"
        "assert not hasattr(eval.metrics, 'Kernel')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

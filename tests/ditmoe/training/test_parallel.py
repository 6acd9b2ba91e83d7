"""Expert parallelism on real processes: it trains the same network, holds a part of it, and saves all of it."""

import json
import re
import shutil
import signal

import pytest
import torch

from ditmoe.config.sections import Config, MoEConfig, ParallelConfig
from ditmoe.pipeline import load
from ditmoe.run_folder import checkpoint
from tests import checkpoints
from tests.faults import runs

STEPS = ["--max-steps", 6, "--train.learning-rate", 0.002, "--train.warmup-steps", 1, "--train.clip", 0.3]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    assert runs.training(out, *STEPS).wait() == [0]
    return out


def parts_of(out):
    return checkpoints.load(checkpoints.newest(out / "checkpoints"))[0]


def trained_alike(out, other):
    """Weights, averages, moments and losses are the same, but for the order of sums."""
    found, wanted = parts_of(out), parts_of(other)
    for part in ("model", "ema", "optimizer"):
        assert found[part].keys() == wanted[part].keys()
        for name, value in wanted[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=0, atol=1e-4, msg=f"{part} {name}")
    for one, two in zip(runs.rows(out), runs.rows(other), strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        for name in {"loss", "load_max_over_mean", "contrastive"} & two.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-5)


WAYS = [(2, 1, False), (2, 2, False), (4, 2, False), (4, 4, False), (2, 1, True), (2, 2, True), (4, 2, True)]


@pytest.mark.parametrize(("world", "degree", "shard"), WAYS)
def test_it_trains_what_one_process_trains(tmp_path, alone, world, degree, shard):
    out = tmp_path / "run"
    flags = ["--parallel.experts", degree, *(["--parallel.shard"] if shard else [])]
    group = runs.training(out, *STEPS, *flags, world=world)
    assert group.wait() == [0] * world, group.err() + group.err(1)
    assert f"training on {world} process(es)" in group.out()
    assert (f"experts split over {degree}, " in group.out()) == (degree > 1)
    assert ("the rest sharded, " in group.out()) == shard
    assert "Warning" not in group.err()
    trained_alike(out, alone)
    assert all(row["grad_norm"] > 0.3 for row in runs.rows(out))  # clipped
    files = sorted(p.name for p in checkpoints.newest(out / "checkpoints").glob("model*"))
    writers = world if shard else degree if degree > 1 else 0
    assert files == ["model.safetensors", *(f"model.shard-{n}.safetensors" for n in range(writers))]


@pytest.mark.parametrize("shard", [[], ["--parallel.shard"]])
def test_a_run_changes_its_degree_and_ends_as_a_pipeline(tmp_path, alone, shard):
    out = tmp_path / "run"
    for steps, degree, world in ((2, 2, 2), (4, 1, 1), (6, 2, 2)):
        flags = [*STEPS[2:], "--max-steps", steps, "--parallel.experts", degree, *(shard if world > 1 else [])]
        group = runs.training(out, *flags, world=world)
        assert group.wait() == [0] * world, group.err()
    found, wanted = parts_of(out), parts_of(alone)
    for name, value in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=0, atol=1e-4, msg=name)
    shards = sorted(p.name for p in (out / "model" / "transformer").glob("*.safetensors"))
    assert len(shards) == 3  # one a block, one for the rest
    weights = load(out / "model").transformer.state_dict()
    assert weights.keys() == load(alone / "model").transformer.state_dict().keys()
    assert all(torch.equal(value, found["ema"][name]) for name, value in weights.items())
    index = json.loads((out / "model/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in weights.values())


@pytest.mark.parametrize(
    "how", [["--parallel.experts", 2], ["--parallel.shard"], ["--parallel.experts", 2, "--parallel.shard"]]
)
def test_a_process_builds_and_reads_its_own_part(tmp_path, how):
    out = tmp_path / "run"
    for steps in (2, 3):
        flags = [*STEPS[2:], "--max-steps", steps, "--moe.num-experts", 64, *how]
        group = runs.training(out, *flags, world=2, hook=runs.counted_parts, name=f"log{steps}")
        assert group.wait() == [0, 0], group.err()
    assert group.out(0).count("built on cpu") == 1
    assert "built on cpu" not in group.out(1)
    for rank in (0, 1):  # a weight of one row is whole on the first
        share = float(re.search(r"read ([\d.]+) of the checkpoint", group.out(rank))[1])
        assert 0.49 <= share < (0.55 if "--parallel.shard" in how else 0.75)


def test_processes_share_the_verification_of_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    flags = [*STEPS[2:], "--parallel.experts", 2, "--train.checkpoint-every", 1]
    assert runs.training(out, *flags, "--max-steps", 2, world=2).wait() == [0, 0]
    for name in ("model.shard-0.safetensors", "ema.shard-1.safetensors", "optimizer.safetensors", "state.json"):
        copied = tmp_path / name / "run"
        shutil.copytree(out, copied)
        file = copied / "checkpoints" / "step-000002" / name
        raw = bytearray(file.read_bytes())
        raw[-2] ^= 1
        file.write_bytes(raw)
        group = runs.training(copied, *flags, "--max-steps", 3, world=2)
        assert group.wait() == [0, 0], group.err()
        assert f"{name} has other content" in group.out()
        assert "resumed at step 1 of 3" in group.out()


@pytest.mark.parametrize("how", [["--parallel.experts", 2], ["--parallel.shard"]])
def test_it_samples_while_it_trains(tmp_path, how):
    out = tmp_path / "run"
    flags = [*STEPS, *how, "--train.sample-every", 3]
    group = runs.training(out, *flags, hook=runs.checked_samples, world=2)
    assert group.wait() == [0, 0], group.err()
    assert group.out().count("whole network at step") == 2


@pytest.mark.parametrize("more", [[], ["--parallel.experts", 2], ["--model.gradient-checkpointing"]])
def test_bfloat16_is_gathered_of_float32_slices_but_for_routers(tmp_path, more):
    plain, out = tmp_path / "plain", tmp_path / "run"
    flags = [*STEPS, "--train.precision", "bf16"]
    assert runs.training(plain, *flags).wait() == [0]
    ways = ["--parallel.shard", "--parallel.gather", "bfloat16", *more]
    group = runs.training(out, *flags, *ways, hook=runs.told_dtypes, world=2)
    assert group.wait() == [0, 0], group.err()
    assert set(re.findall(r".* computes with .*", group.out())) == {
        "Router computes with torch.float32",
        "Attention computes with torch.bfloat16",
    }
    assert all(v.dtype == torch.float32 for part in parts_of(out).values() for v in part.values())
    for one, other in zip(runs.rows(out), runs.rows(plain), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2)


def test_split_experts_with_muon_are_resumed_to_the_bit(tmp_path):
    muon = ["--train.optimizer", "muon", "--train.muon-on", "all", "--train.muon-factor", 2]
    flags = [*STEPS[2:], *muon, "--parallel.experts", 2]
    for name, legs in (("whole", (4,)), ("parts", (2, 4))):
        for steps in legs:
            group = runs.training(tmp_path / name, *flags, "--max-steps", steps, world=2)
            assert group.wait() == [0, 0], group.err()
    whole, parts = parts_of(tmp_path / "whole"), parts_of(tmp_path / "parts")
    for part in ("model", "ema", "optimizer"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items()), part
    assert any("experts" in name and name.endswith("momentum") for name in whole["optimizer"])


def test_what_fashion_is_made_of_trains_as_in_one_process(tmp_path):
    made_of = ["--model.local-conv", "--model.long-skips", "--model.refine-width", 8, "--model.positions", "sincos"]
    made_of += ["--train.optimizer", "muon", "--train.muon-factor", 2, "--moe.router-input", "position"]
    for name, world, how in (("one", 1, []), ("two", 2, []), ("split", 2, ["--parallel.experts", 2])):
        group = runs.training(tmp_path / name, *STEPS, *made_of, *how, world=world)
        assert group.wait() == [0] * world, group.err()
    for name in ("two", "split"):
        trained_alike(tmp_path / name, tmp_path / "one")


def test_accumulation_and_place_routing(tmp_path):
    losses = []
    for name, world, degree in (("one", 1, 1), ("two", 2, 2)):
        out = tmp_path / name
        flags = [*STEPS, "--train.accumulation", 2, "--moe.router-input", "position", "--parallel.experts", degree]
        group = runs.training(out, *flags, world=world)
        assert group.wait() == [0] * world, group.err()
        losses.append([(row["loss"], row["grad_norm"]) for row in runs.rows(out)])
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


PROTOTYPES = [
    *("--moe.router", "prototype", "--moe.router-input", "plain+position", "--moe.bias-rate", 0),
    *("--moe.contrastive-weight", 1, "--moe.balance-weight", 0),
]


@pytest.fixture(scope="module")
def prototypes_alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("prototypes") / "run"
    assert runs.training(out, *STEPS, *PROTOTYPES).wait() == [0]
    return out


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--parallel.experts", 2, "--train.accumulation", 2],
        ["--parallel.shard"],
        ["--parallel.experts", 2, "--parallel.shard", "--model.gradient-checkpointing"],
    ],
)
def test_prototypes_are_drawn_to_the_tokens_of_all_processes(tmp_path, prototypes_alone, how):
    out = tmp_path / "run"
    group = runs.training(out, *STEPS, *PROTOTYPES, *how, world=2)
    assert group.wait() == [0, 0], group.err() + group.err(1)
    trained_alike(out, prototypes_alone)
    assert "contrastive" in runs.rows(out)[0]


@pytest.mark.parametrize("at_rank", [0, 1])
def test_a_disk_that_is_full_for_one_process_costs_one_checkpoint(tmp_path, at_rank):
    out = tmp_path / "run"
    flags = ["--max-steps", 4, "--parallel.experts", 2, "--train.checkpoint-every", 1]
    group = runs.training(out, *flags, world=2, hook=runs.full_disk, args=(str(out), (2,), at_rank))
    assert group.wait(60) == [0, 0], group.err() + group.err(1)
    assert "No space left" in group.out(at_rank)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert all(checkpoint.find_fault(p) is None for p in (out / "checkpoints").iterdir())


def test_a_process_that_dies_while_it_saves_its_slices_keeps_nobody(tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", 90, "--parallel.experts", 2, "--train.checkpoint-every", 3]
    group = runs.training(out, *flags, world=2, hook=runs.full_disk, args=(str(out), (6,), 1, True))
    codes = group.wait(60)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 2)
    assert checkpoints.newest(out / "checkpoints").name == "step-000003"
    assert runs.training(out, "--max-steps", 8, "--train.checkpoint-every", 3).wait() == [0]


@pytest.mark.parametrize(
    ("world", "flags", "sentence"),
    [
        (1, ["--parallel.experts", 2], "parallel.experts is 2, but the launch has 1 process(es)"),
        (2, ["--parallel.experts", 4], "parallel.experts is 4, but the launch has 2 process(es)"),
        (1, ["--parallel.shard"], "parallel.shard needs several processes"),
        (2, ["--parallel.experts", 2, "--moe.num-experts", 5], "parallel.experts 2 does not divide moe.num_experts 5"),
    ],
)
def test_what_cannot_be_split_is_refused_on_every_process(tmp_path, world, flags, sentence):
    group = runs.training(tmp_path / "run", *STEPS, *flags, world=world)
    assert group.wait(60) == [2] * world
    for rank in range(world):
        assert sentence in group.err(rank)
        assert "Traceback" not in group.err(rank)
    assert not (tmp_path / "run").exists()


def test_slices_of_fewer_experts_than_processes_are_told_of(tmp_path):
    for flags in ([], ["--moe.num-experts", 2]):
        group = runs.training(tmp_path / f"{len(flags)}", *STEPS, *flags, "--parallel.shard", world=4 if flags else 2)
        assert set(group.wait()) == {0}
        assert group.out().count("note: 2 stacked experts in slices over 4 processes are padded") == len(flags) // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "flags", "precision"),
    [
        *((1, [], precision) for precision in ("fp32", "bf16")),
        *((2, ["--parallel.experts", 2], precision) for precision in ("fp32", "bf16")),
        *((2, ["--parallel.shard"], precision) for precision in ("fp32", "bf16")),
        (2, [], "bf16"),
        (2, ["--parallel.shard", "--parallel.gather", "bfloat16"], "bf16"),
    ],
)
def test_compiled_blocks_train_the_same(tmp_path, alone, world, flags, precision):
    out, plain = tmp_path / "run", alone
    more = ["--train.precision", precision]
    if precision == "bf16":
        plain = tmp_path / "plain"
        assert runs.training(plain, *STEPS, *more).wait() == [0]
    group = runs.training(out, *STEPS, *flags, *more, "--train.compile", world=world)
    assert group.wait(280) == [0] * world, group.err()
    for one, other in zip(runs.rows(out), runs.rows(plain), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4 if precision == "fp32" else 2e-2)


def test_gathering_bfloat16_needs_slices_and_bf16(tmp_path):
    with pytest.raises(ValueError, match="gather bfloat16 needs --parallel.shard"):
        Config(parallel=ParallelConfig(gather="bfloat16"))
    flags = ["--parallel.shard", "--parallel.gather", "bfloat16"]
    group = runs.training(tmp_path / "run", *STEPS, *flags, world=2)
    assert group.wait(60) == [2, 2]
    assert "parallel.gather bfloat16 needs --train.precision bf16" in group.err()


def test_a_model_without_experts_has_none_to_split():
    with pytest.raises(ValueError, match="does not apply to a model without experts"):
        Config(moe=MoEConfig(blocks="none"), parallel=ParallelConfig(experts=2))

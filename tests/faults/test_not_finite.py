"""Values that are not finite, on one rank of two: all agree, nothing moves, the step is named and counted."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests import checkpoints
from tests.faults import runs


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("loss", "rank 1: loss total, loss mse of samples 24..31"),
        ("gradient", "gradient norm"),
        ("router", "rank 1: router logits of MoE layer 0"),
        ("images", "rank 1: images, router logits of MoE layer 0"),
    ],
)
def test_one_bad_rank_skips_the_step_everywhere(tmp_path, what, named):
    out = tmp_path / "run"
    flags = ["--train.checkpoint-every", 1, "--train.keep", 0]
    group = runs.training(out, *flags, "--max-steps", 2, hook=runs.poison, args=(what, 1, [2]), world=2)
    assert group.wait() == [0, 0], group.err() + group.err(1)
    assert runs.training(out, *flags, "--max-steps", 3, world=2, name="more").wait() == [0, 0]
    assert "step 2 was skipped, not finite: " in group.err()
    assert named in group.err()
    one, two, three = (checkpoints.load(out / f"checkpoints/step-00000{n}")[0] for n in (1, 2, 3))
    for part in one:
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    assert not torch.equal(two["model"]["blocks.0.attn.qkv.weight"], three["model"]["blocks.0.attn.qkv.weight"])
    log = runs.rows(out)
    assert [row["skipped_steps"] for row in log] == [0, 1, 1]
    assert log[1]["loss"] is None
    assert named in "; ".join(log[1]["faults"])


@pytest.mark.parametrize("split", [["--parallel.shard"], ["--parallel.experts", 2]])
def test_one_bad_rank_of_a_split_model_keeps_nobody_waiting(tmp_path, split):
    """Where the others look for what is wrong, they must not ask the one that already knows."""
    out = tmp_path / "run"
    group = runs.training(out, "--max-steps", 3, *split, hook=runs.poison, args=("loss", 1, [2]), world=2)
    assert group.wait(60) == [0, 0], group.err() + group.err(1)
    assert "rank 1: loss total" in group.err()
    assert [row["skipped_steps"] for row in runs.rows(out)] == [0, 1, 1]


def test_too_many_in_a_row_stop_all_ranks(tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", 9, "--train.max-skipped", 2, "--train.checkpoint-every", 1]
    group = runs.training(out, *flags, hook=runs.poison, args=("loss", 1, [2, 4, 5, 6]), world=2)
    assert group.wait(60) == [1, 1]
    for rank in (0, 1):
        assert "error: 3 steps in a row were not finite, the last: step 6 was skipped" in group.err(rank)
        assert "Traceback" not in group.err(rank)
    path = checkpoints.newest(out / "checkpoints")
    assert all(v.isfinite().all() for part in checkpoints.load(path)[0].values() for v in part.values())


def test_a_state_that_only_gives_what_is_not_finite_does_not_push_out_the_healthy_ones(tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", 30, "--train.max-skipped", 5, "--train.checkpoint-every", 1, "--train.keep", 1]
    group = runs.training(out, *flags, hook=runs.blown_up, args=(4, 1e25))
    assert group.wait() == [1]
    assert "no regular checkpoint was made since the first of them" in group.err()
    assert checkpoints.newest(out / "checkpoints").name == "step-000003"
    assert runs.training(out, *flags).wait() == [0]  # from before the accident


def test_a_checkpoint_that_was_due_in_a_skipped_step_is_made_after_it(tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", 7, "--train.checkpoint-every", 2, "--train.keep", 0]
    assert runs.training(out, *flags, hook=runs.poison, args=("loss", 0, [2])).wait() == [0]
    found = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert found == [f"step-00000{n}" for n in (3, 4, 6, 7)]


def test_steps_in_a_row_are_counted_over_restarts(tmp_path):
    out = tmp_path / "run"
    codes = []
    for steps in (2, 4):
        group = runs.training(
            out, "--train.max-skipped", 2, "--max-steps", steps, hook=runs.poison, args=("loss", 0, [1, 2])
        )
        codes += group.wait()
    assert codes == [0, 1]
    assert "3 steps in a row" in group.err()


@pytest.mark.parametrize("kind", ["not finite", "zero"])
def test_latents_of_a_broken_vae(tmp_path, kind):
    latents = torch.randn(32, 4, 8, 8) if kind == "not finite" else torch.zeros(32, 4, 8, 8)
    if kind == "not finite":
        latents[5, 1] = float("nan")
    (tmp_path / "latents").mkdir()
    save_file({"latents": latents, "labels": torch.arange(32) % 2}, tmp_path / "latents" / "0.safetensors")
    flags = ["--data.name", "latents", "--data.path", tmp_path / "latents", "--model.in-channels", 4]
    out = tmp_path / "run"
    group = runs.training(out, *flags, "--max-steps", 4)  # two epochs of two steps
    assert group.wait() == [0], group.err()
    assert runs.rows(out)[-1]["skipped_steps"] == (2 if kind == "not finite" else 0)
    assert group.err().count("rank 0: images, ") == (2 if kind == "not finite" else 0)
    weights = checkpoints.load(out / "checkpoints/step-000004")[0]["model"]
    assert all(value.isfinite().all() for value in weights.values())
    variance = json.loads((out / "model/scheduler/scheduler_config.json").read_text())["data_variance"]
    assert variance == pytest.approx(1.0 if kind == "not finite" else 0.0, abs=0.05)

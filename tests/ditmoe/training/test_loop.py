"""The loop: exact resume, the moving average, the learning rate, run folders, accumulation, the loss-free bias."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditmoe.config.rules import RULES
from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.data.pixels import to_pixels
from ditmoe.launch.signals import Interrupted
from ditmoe.launch.start import launched
from ditmoe.model import build
from ditmoe.training.loop import train
from ditmoe.training.parallel import Parallel
from ditmoe.training.state import new_state, update_ema
from tests import checkpoints
from tests.ditmoe.conftest import TINY_MOE

Tiny = Callable[..., Config]


def go(config: Config, **more: Any) -> bool:
    data = open_data(config.data, size=config.model.sample_size, channels=config.model.in_channels)
    return train(config, data, **more)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut_equals_straight(run: Callable[[str, int], Config]) -> Path:
    """run(name, last step): five steps at once, and two and then the rest, end alike; the folder of the first."""
    straight = run("straight", 5).out
    for stop in (2, 5):
        cut = run("cut", stop).out
    last = Path("checkpoints/step-000005")
    same_checkpoint(straight / last, cut / last)
    return straight


def same_checkpoint(a: Path, b: Path) -> None:
    (parts_a, _), (parts_b, _) = checkpoints.load(a), checkpoints.load(b)
    assert parts_a.keys() == parts_b.keys() >= {"model", "ema", "optimizer"}
    for part in parts_a:
        assert parts_a[part].keys() == parts_b[part].keys()
        for name, value in parts_a[part].items():
            assert torch.equal(value, parts_b[part][name]), f"{part} {name}"


PROTOTYPES = {"router": "prototype", "router_input": "plain+position", "contrastive_weight": 0.5}
FASHION = {  # what the preset of that name is made of
    "model": {"refine_width": 8, "local_conv": True, "long_skips": True, "positions": "sincos"},
    "moe": {"router_input": "position"},
    "train": {"optimizer": "muon", "muon_factor": 2.0, "clip": 0.5},
}


@pytest.mark.parametrize(
    "changes", [{}, {"train": {"accumulation": 2}}, {"moe": PROTOTYPES}, FASHION], ids=["", "parts", "proto", "fashion"]
)
def test_resume_is_exact_to_the_bit(tiny: Tiny, tmp_path: Path, changes: dict[str, dict[str, Any]]) -> None:
    changes = {**changes, "train": {"decay_steps": 8, **changes.get("train", {})}}
    straight = tiny(out=tmp_path / "straight", max_steps=8, **changes)
    assert go(straight)
    for stop in (3, 8):  # 1,497 images a 16: mid-epoch
        assert go(tiny(out=tmp_path / "cut", max_steps=stop, **changes))
    last = Path("checkpoints/step-000008")
    same_checkpoint(straight.out / last, tmp_path / "cut" / last)
    weights, zero_at_first = checkpoints.load(straight.out / last)[0]["model"], ("conv3.", "local_conv.", "skip.")
    assert all(value.any() for name, value in weights.items() if any(part in name for part in zero_at_first))
    timeless = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(run)]
                for run in (straight.out, tmp_path / "cut")]  # fmt: skip
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == list(range(1, 9))


RULED = {name: {**RULES[name](TINY_MOE.num_experts, TINY_MOE.top_k, TINY_MOE.expert_width)} for name in RULES}
RULED["mumoe"]["bias_rate"] = 0.0
OTHERS = {
    "label": {"router_input": "label"}, "label+place": {"router_input": "label+position"},
    "annealed": {"overflow": "order", "capacity_start": 4.0, "capacity": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", [*RULED, *OTHERS, "muon"])
def test_every_rule_is_resumed_to_the_bit(tiny: Tiny, tmp_path: Path, name: str) -> None:
    moe, section = {**RULED, **OTHERS}.get(name, {}), {"decay_steps": 4}
    if name == "centroid":
        E, D = TINY_MOE.num_experts, tiny().model.hidden_size
        save_file({"blocks.1": torch.randn(E, D)}, tmp_path / "centres.safetensors")
        moe = {**moe, "centroids": tmp_path / "centres.safetensors"}
    section |= {"optimizer": "muon"} if name == "muon" else {}
    straight = tiny(out=tmp_path / "straight", max_steps=4, train=section, moe=moe)
    assert go(straight)
    stopped = tiny(out=tmp_path / "cut", max_steps=4, train={**section, "sample_every": 2}, moe=moe)

    def stop(step: int, _: Any) -> None:
        if step == 2 and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        go(stopped, on_sample=stop)
    assert go(stopped, on_sample=stop)
    last = Path("checkpoints/step-000004")
    same_checkpoint(straight.out / last, tmp_path / "cut" / last)


def test_a_capacity_is_annealed_to_its_end(tiny: Tiny) -> None:
    """Early steps leave nobody out, the last ones do: the log has the share."""
    moe, section = {"overflow": "order", "capacity_start": 8.0, "capacity": 0.01, "num_experts": 2}, {"decay_steps": 6}
    for stop in (3, 6):  # what a longer run has yet to come changes nothing
        go(tiny(max_steps=stop, train=section, moe=moe))
    go(tiny(max_steps=6, train=section, moe=moe, out=tiny().out.with_name("straight")))
    assert [r["unserved"] for r in rows(tiny().out)] == [r["unserved"] for r in rows(tiny().out.with_name("straight"))]
    with pytest.raises(ValueError, match="capacity_start needs --train.decay-steps N"):
        go(tiny(max_steps=6, moe=moe, out=tiny().out.with_name("endless")))
    shares = [row["unserved"] for row in rows(tiny().out)]
    assert shares[0] == 0
    assert shares[-1] == 0.75  # of four tokens the first alone has room


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(tiny: Tiny) -> None:
    assert go(tiny(max_steps=2))
    assert not go(tiny(max_steps=2))
    assert go(tiny(max_steps=3))
    assert [row["step"] for row in rows(tiny().out)] == [1, 2, 3]


def test_another_configuration_in_the_same_folder_is_refused(tiny: Tiny) -> None:
    go(tiny(max_steps=1))
    before = (tiny().out / "config.json").read_text()
    with pytest.raises(ValueError, match=r"train.learning_rate: 0.002 -> 0.1"):
        go(tiny(max_steps=1, train={"learning_rate": 0.1}))
    assert (tiny().out / "config.json").read_text() == before


def test_a_folder_that_is_no_run_is_left_alone(tiny: Tiny) -> None:
    out = tiny().out
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        go(tiny())
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_a_damaged_newest_checkpoint_is_skipped(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    go(tiny(max_steps=4, train={"checkpoint_every": 2}))
    newest = tiny().out / "checkpoints" / "step-000004"
    reference = load_file(newest / "ema.safetensors")
    raw = bytearray((newest / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (newest / "model.safetensors").write_bytes(raw)
    go(tiny(max_steps=5, train={"checkpoint_every": 2}))
    assert "model.safetensors has other content" in capfd.readouterr().out
    assert [row["step"] for row in rows(tiny().out)] == [1, 2, 3, 4, 5]
    go(tiny(out=tiny().out.with_name("other"), max_steps=4))
    again = load_file(tiny().out.with_name("other") / "checkpoints/step-000004/ema.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in reference.items())


def test_no_whole_checkpoint_is_an_error_not_a_restart(tiny: Tiny) -> None:
    go(tiny(max_steps=1))
    (tiny().out / "checkpoints" / "step-000001" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint .* is whole"):
        go(tiny(max_steps=2))


def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tiny: Tiny, tmp_path: Path) -> None:
    calls: list[int] = []

    def at_step(step: int, _: Any) -> None:
        calls.append(step)
        if step == 2 and len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    section = {"sample_every": 1}
    with pytest.raises(Interrupted, match="step 2"):
        go(tiny(max_steps=5, train=section), on_sample=at_step)
    assert go(tiny(max_steps=5, train=section), on_sample=at_step)
    go(tiny(out=tmp_path / "straight", max_steps=5))
    last = Path("checkpoints/step-000005")
    same_checkpoint(tiny().out / last, tmp_path / "straight" / last)
    assert calls == [1, 2, 2, 3, 4, 5]  # the one that was cut short is made again


def test_samples_that_are_not_finite_do_not_end_a_run(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    def at_step(step: int, _: Any) -> None:
        if step == 1:
            to_pixels(torch.full((1, 1, 8, 8), torch.nan))

    assert go(tiny(max_steps=2, train={"sample_every": 1}), on_sample=at_step)
    assert "warning: there are no samples of step 1 (images are not finite" in capsys.readouterr().out
    assert (tiny().out / "model" / "model_index.json").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("router", ["linear", "mlp", "prototype"])
def test_every_parameter_is_in_one_group_of_the_optimiser(tiny: Tiny, router: str, optimizer: str) -> None:
    config = tiny(moe={"router": router}, train={"optimizer": optimizer})
    state = new_state(config, 10, Parallel(launched(config.train), config.parallel, config.moe.num_experts))
    found = [id(p) for group in state.optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in state.model.parameters())


@pytest.mark.parametrize(
    "moe",
    [
        {"balance_weight": 0.5},
        {"balance_weight": 0.5, "balance_over": "model"},
        PROTOTYPES,
        {"balance_weight": 0.5, "router_input": "position"},
    ],
)
def test_gradient_accumulation_equals_one_batch(tiny: Tiny, tmp_path: Path, moe: dict[str, Any]) -> None:
    """Losses of loads, which are no means over samples, included: their loads are those of the step."""
    finals = []
    for parts in (1, 4):
        out = tmp_path / f"parts{parts}"
        go(tiny(out=out, max_steps=3, train={"accumulation": parts}, moe=moe))
        finals.append(rows(out))
    for one, four in zip(*finals, strict=True):
        for name in {"loss", "balance", "contrastive"} & one.keys():
            assert one[name] == pytest.approx(four[name], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)
        assert one["load_entropy"] == pytest.approx(four["load_entropy"], abs=2e-3)


def test_it_learns_and_logs_every_part(tiny: Tiny) -> None:
    go(tiny(max_steps=60, train={"learning_rate": 3e-3}))
    log = rows(tiny().out)
    assert {"loss", "mse", "balance", "z", "grad_norm", "lr", "images_per_second", "load_max_over_mean",
            "dead_experts", "load_entropy"} <= log[0].keys()  # fmt: skip
    first, last = (sum(row["mse"] for row in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.9 * first


def test_the_bias_is_really_updated_saved_and_averaged(tiny: Tiny) -> None:
    go(tiny(max_steps=3))
    parts, _ = checkpoints.load(tiny().out / "checkpoints" / "step-000003")
    bias = parts["model"]["blocks.1.moe.router.expert_bias"]
    assert bias.abs().max() > 0
    assert abs(float(bias.mean())) < 1e-8
    assert parts["ema"]["blocks.1.moe.router.expert_bias"].abs().max() > 0
    from ditmoe.pipeline import load

    shipped = load(tiny().out).transformer.blocks[1].moe.router.expert_bias
    assert torch.equal(shipped, parts["ema"]["blocks.1.moe.router.expert_bias"])


@pytest.mark.parametrize("select", ["relative", "top_p", "threshold"])
def test_the_bias_is_moved_to_the_wanted_number_of_experts(tiny: Tiny, select: str) -> None:
    """Almost all experts at the start, so that every bias falls, which mean 0 would not let it."""
    go(tiny(max_steps=3, moe={"select": select, "tau": 0.02 if select == "threshold" else 0.99}))
    parts, _ = checkpoints.load(tiny().out / "checkpoints" / "step-000003")
    assert (parts["model"]["blocks.1.moe.router.expert_bias"] < 0).all()


def test_ema_follows_its_rule() -> None:
    ema, model = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(1.0)
        model.num_batches_tracked.fill_(7)
    update_ema(ema, model, 0.75)
    assert ema.weight.tolist() == [1.5, 1.5]
    assert ema.running_mean.tolist() == [0.25, 0.25]
    assert ema.num_batches_tracked.item() == 7


def test_a_router_has_a_smaller_learning_rate(tiny: Tiny) -> None:
    config = tiny(max_steps=1, train={"warmup_steps": 0})
    torch.manual_seed(config.seed)
    before = build(config, 10).state_dict()
    go(config)
    (parts, _) = checkpoints.load(config.out / "checkpoints" / "step-000001")
    moved = {name: (value - before[name]).abs().max().item() for name, value in parts["model"].items()}
    rate = config.train.learning_rate  # Adam's first step is the rate, for every weight with a gradient
    assert moved["blocks.1.moe.router.weight"] == pytest.approx(rate * config.model.hidden_size**-0.5, rel=0.01)
    assert moved["final_layer.linear.weight"] == pytest.approx(rate, rel=0.01)


def test_a_batch_that_does_not_divide_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="multiple of accumulation"):
        tiny(train={"accumulation": 5})


def test_another_data_set_is_not_resumed(tiny: Tiny) -> None:
    go(tiny(max_steps=1))
    fewer = open_data(tiny().data, size=8, channels=1, split="test")
    with pytest.raises(ValueError, match="data set is not the one"):
        train(tiny(max_steps=2), fewer)


def test_a_folder_that_cannot_be_made(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="file is a file"):
            go(tiny(out=out))


def test_labels_that_the_data_lacks_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="num_classes is 4 but the data set has 10"):
        go(tiny(model={"num_classes": 4}))
    assert not tiny().out.exists()


def test_steps_that_are_not_finite_are_skipped_named_and_stop_the_run(
    tiny: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    section = {"learning_rate": 1e30, "warmup_steps": 0, "clip": 0.0, "checkpoint_every": 1, "max_skipped": 2}
    assert go(tiny(max_steps=3, train=section))  # where a run ends it saves, and where steps are skipped else not
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* step 4 .* rank 0: router logits of MoE layer 0"):
        go(tiny(max_steps=9, train=section))
    error = capfd.readouterr().err
    assert "step 2 was skipped, not finite: rank 0: router logits of MoE layer 0" in error
    assert "of samples 16..31" in error
    log = rows(tiny().out)
    assert [(row["step"], row["loss"] is None, row["skipped_steps"]) for row in log] == [
        (1, False, 0), (2, True, 1), (3, True, 2),
    ]  # fmt: skip
    (first, _), (last, state) = (checkpoints.load(tiny().out / f"checkpoints/step-00000{n}") for n in (1, 3))
    assert state["skipped_steps"] == 2
    assert len(list((tiny().out / "checkpoints").iterdir())) == 2
    for part in first:
        assert all(torch.equal(first[part][name], last[part][name]) for name in first[part])
        assert all(torch.isfinite(v).all() for v in last[part].values())

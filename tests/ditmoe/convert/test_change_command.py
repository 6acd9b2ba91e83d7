"""The command that changes models: what each option writes, and what does not go together."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe import pipeline
from ditmoe.config.file import read_config, save
from ditmoe.config.sections import Config, DataConfig, MoEConfig, TrainConfig
from ditmoe.convert.split import split
from ditmoe.data.open import open_data
from ditmoe.model import count_parameters
from ditmoe.training.loop import train
from tests.ditmoe.convert.toys import MODEL, drawn, network, off
from tests.doors import command

convert = partial(command, "convert")


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers need not know the norms here."""
    monkeypatch.setattr("ditmoe.convert.change.split", partial(split, steps=20))


def saved(folder: Path, seed: int = 0, **moe: Any) -> Path:
    config = Config(model=MODEL, moe=MoEConfig(**moe), train=TrainConfig(optimizer="muon"))
    pipe = pipeline.assemble(network(seed, **moe), config, {i: str(i) for i in range(10)})
    pipeline.save(pipe, folder)
    save(config, folder / "training.json")
    return folder


@pytest.mark.parametrize(("words", "weight"), [(["--more"], 0.0), (["--prune", 8, "--by", "random"], 0.1)])
def test_data_sets_lose_their_loss_with_the_numbers_of_their_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[Any], weight: float
) -> None:
    source = saved(tmp_path / "model")
    moe, data = MoEConfig(domain_weight=0.1), DataConfig(mixture=("digits", "fashion"), fit="crop")
    save(Config(model=MODEL, moe=moe, data=data), source / "training.json")
    assert convert(source, tmp_path / "out", *words) == 0
    assert read_config(tmp_path / "out", "training.json").moe.domain_weight == weight
    assert ("moe.domain_weight is left out" in capsys.readouterr().out) == (weight == 0)


@pytest.mark.parametrize(
    ("moe", "words", "same"),
    [
        ({"blocks": "none"}, ["--upcycle", 6, "--blocks", "every-second"], 1e-5),
        ({"blocks": "none"}, ["--upcycle", 3, "--copies", "--router-input", "position"], 1e-5),
        ({"blocks": "none"}, ["--split", 6, "--tau", 1, "--num", 20], 1e-5),
        ({"blocks": "none"}, ["--split", 4, "--domains", "time", "--num", 20], None),
        ({"blocks": "none"}, ["--split", 5, "--domains", "class", "--num", 90, "--keep", 0.7], None),
        ({"bias_rate": 0.01}, ["--more"], 1e-4),
        ({"bias_rate": 0.01}, ["--prune", 8, "--num", 20], 1e-6),
        ({"bias_rate": 0.01}, ["--prune", 5, "--by", "random", "--seed", 3], None),
        ({"bias_rate": 0.01}, ["--merge", "other"], None),
    ],
)
def test_a_changed_model_is_written_with_what_trains_it_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], moe: dict[str, Any], words: list[Any], same: float | None
) -> None:
    source, out = saved(tmp_path / "model", **moe), tmp_path / "out"
    other = saved(tmp_path / "other", 1, **moe)
    assert convert(source, out, *(other if word == "other" else word for word in words)) == 0
    before, after = (pipeline.load(folder).transformer.eval() for folder in (source, out))
    if same is not None:
        assert off(drawn(after), drawn(before)) < same
    config = read_config(out, "training.json")
    assert config.train.init == out.absolute()
    assert config.train.optimizer == "muon"
    assert config.train.muon_on == ("all" if "--upcycle" in words else "trunk")
    small = replace(
        config.train, batch_size=16, warmup_steps=1, learning_rate=1e-6, precision="fp32", checkpoint_every=10
    )
    config = replace(config, out=tmp_path / "run", max_steps=2, train=small)
    assert train(config, open_data(config.data, size=8, channels=1))
    assert off(drawn(pipeline.load(config.out).transformer.eval()), drawn(after)) < 0.5  # biases of routers move
    assert (config.moe.num_experts, config.moe.blocks) == (after.config.num_experts, after.config.moe_blocks)
    assert config.moe.router_input == after.config.router_input
    said = capsys.readouterr().out
    assert all(f"{n / 1e6:.2f} M" in said for net in (before, after) for n in count_parameters(net))
    assert f"python -m ditmoe train {out}/training.json --out RUN" in said


def test_only_what_says_how_it_was_trained_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A converted checkpoint has no training.json: experts can be made of it, and not measured."""
    source = saved(tmp_path / "model", blocks="none")
    (source / "training.json").unlink()
    assert convert(source, tmp_path / "split", "--split", 6) == 2
    assert "neither config.json nor training.json" in capsys.readouterr().err
    assert not (tmp_path / "split").exists()
    assert convert(source, tmp_path / "up", "--upcycle", 6) == 0
    assert "does not say how it was trained" in capsys.readouterr().out
    (source / "training.json").write_text("{}")
    assert convert(source, tmp_path / "bad", "--upcycle", 6) == 2  # what is there and broken is no reason to guess
    assert not (tmp_path / "bad").exists()
    assert read_config(tmp_path / "up", "training.json").data.name == "latents"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prune", 5, "--more"], "--more and --prune are two changes"),
        (["--prune", 5, "--tau", 0.2], "--tau works with --split"),
        (["--more", "--num", 10], "--num works with --prune or --split"),
        (["--more", "--router-input", "time"], "--router-input works with --upcycle"),
        (["--more", "--to", "dit"], "--to dit does not go with --more"),
        (["--more", "--num-heads", 2], "--num-heads does not apply to --more"),
        (["--prune", 50], "50 experts cannot be kept of 8 with top_k 2"),
        (["--upcycle", 6], "the model has experts already"),
        (["--merge", "nowhere"], "nowhere holds no model"),
        (["--more", "--top-k", 4], "--top-k does not apply to --more"),
        (["--prune", 6, "--by", "random", "--num", 3], "--by random measures none"),
        (["--prune", 0], "prune is 0"),
        (["--upcycle", 0], "upcycle is 0"),
        ([], "--int8 or --lora changes it"),
    ],
)
def test_changes_that_cannot_be_are_refused_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[Any], sentence: str
) -> None:
    source = saved(tmp_path / "model")
    torch.manual_seed(0)
    assert convert(source, tmp_path / "out", *words) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").replace("|", " ").split())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

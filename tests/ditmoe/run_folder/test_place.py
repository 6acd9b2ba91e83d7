"""Whose folder it is, and what may change when its run goes on."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from ditmoe.config.file import save
from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.run_folder.place import check_place
from ditmoe.training.loop import train

Tiny = Callable[..., Config]


def test_a_run_that_moves_to_other_hardware_says_what_changes(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(max_steps=2)
    data = open_data(config.data, size=8, channels=1)
    assert train(config, data, argv=["first"])
    other = replace(config.train, learning_rate=config.train.learning_rate / 2, accumulation=2, precision="fp32")
    config = replace(config, max_steps=4, train=other)
    with pytest.raises(ValueError, match="train.accumulation: 1 -> 2; .* or --train.moved if it goes on"):
        train(config, data)
    capsys.readouterr()
    moved = replace(config, train=replace(other, moved=True))
    assert train(moved, data, argv=["second"])
    said = f"train.learning_rate: {2 * other.learning_rate} -> {other.learning_rate}"
    assert f"note: {said} from here on, as --train.moved allows" in capsys.readouterr().out
    command = (config.out / "command.txt").read_text().splitlines()
    assert command[:2] == ["first", "second"]
    assert f"# {said}" in command
    assert "# train.accumulation: 1 -> 2" in command
    assert json.loads((config.out / "config.json").read_text())["train"]["accumulation"] == 2
    assert '"moved": false' in (config.out / "config.json").read_text()  # it is for one start
    assert train(replace(moved, max_steps=5), data)  # nothing changes any more
    assert train(replace(config, max_steps=6), data)


def test_nothing_else_may_change_and_a_new_run_has_not_moved(tiny: Tiny) -> None:
    config = tiny(max_steps=1)
    data = open_data(config.data, size=8, channels=1)
    moved = replace(config.train, moved=True)
    with pytest.raises(ValueError, match="train.moved is for a run that goes on"):
        train(replace(config, train=moved), data)
    assert train(config, data)
    with pytest.raises(ValueError, match=r"another run \(train.beta2: .*\); give another --out, or the same values$"):
        train(replace(config, max_steps=2, train=replace(moved, beta2=0.5)), data)


def test_sets_of_a_mixture_may_move_and_keep_their_sizes(tiny: Tiny) -> None:
    config = tiny(data={"mixture": ("a", "b@16"), "alternate": True, "fit": "crop"})
    config.out.mkdir()
    save(config, config.out / "config.json")
    check_place(replace(config, data=replace(config.data, mixture=("elsewhere/a", "elsewhere/b@16"))))
    with pytest.raises(ValueError, match=r"another run \(data.sizes: \[None, 16\] -> \[None, 12\]\)"):
        check_place(replace(config, data=replace(config.data, mixture=("a", "b@12"))))

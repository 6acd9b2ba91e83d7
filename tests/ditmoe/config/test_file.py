"""config.json: what is written comes back, older files load, and what is none of ours is refused in a sentence."""

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ditmoe import cli
from ditmoe.config import PRESETS, Config, DataConfig, ModelConfig, TrainConfig
from ditmoe.config.file import differences, read_config, read_file, save, to_dict
from ditmoe.config.sections import MoEConfig
from ditmoe.run_folder.place import check_place

OLD = {  # as the first version that had experts routed by place wrote it
    "out": "runs/fashion", "max_steps": 900, "seed": 0, "dry_run": False,
    "model": {"sample_size": 28, "num_classes": None, "patch_size": 4, "activation": "gelu"},
    "moe": {"blocks": "all", "router_input": "position", "scale": 2},
    "data": {"name": "fashion", "path": "somewhere", "vae": None},
    "train": {"decay_steps": 900},
}  # fmt: skip


def written(folder: Path, values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_comes_back(name: str, tmp_path: Path) -> None:
    config = replace(PRESETS[name], seed=2**40, data=DataConfig(name="latents", path=Path("a b"), vae=Path("vae")))
    save(config, tmp_path / "config.json")
    assert read_config(tmp_path) == read_file(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(config)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_what_an_older_version_did_not_write_has_its_default(tmp_path: Path) -> None:
    written(tmp_path, OLD)
    assert read_config(tmp_path) == Config(
        out=Path("runs/fashion"),
        max_steps=900,
        model=ModelConfig(sample_size=28, patch_size=4, activation="gelu"),
        moe=replace(PRESETS["fashion"].moe, blocks="all", num_experts=8, expert_width=128, shared_width=128, scale=2),
        data=DataConfig(name="fashion", path=Path("somewhere")),
        train=TrainConfig(decay_steps=900),
    )


def test_every_field_of_every_section_is_checked(tmp_path: Path) -> None:
    """No value of a file is a list of lists: in its place each field is refused by its name."""
    sections = [
        (None, Config()),
        *((f.name, v) for f in fields(Config) if is_dataclass(v := getattr(Config(), f.name))),
    ]
    for section, values in sections:
        for field in fields(values):  # type: ignore[arg-type]
            wrong = {field.name: [["x"]]} if section is None else {section: {field.name: [["x"]]}}
            file = written(tmp_path, {**OLD, **wrong})
            with pytest.raises(
                ValueError,
                match=re.escape(f"{file} is not a configuration that can be read: {field.name} is [['x']], which"),
            ):
                read_file(file)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": {"depht": 3}}, "it has depht, which is unknown; did you mean 'depth'?"),
        ({"modle": {}}, "it has modle, which is unknown; did you mean 'model'?"),
        ({"zzz": 1}, "it has zzz, which is unknown"),
        ({"model": 3}, "model is 3, which it cannot be"),
        ({"max_steps": True}, "max_steps is True, which it cannot be"),
        ({"max_steps": 5.5}, "max_steps is 5.5, which it cannot be"),
        ({"max_steps": "5"}, "max_steps is '5', which it cannot be"),
        ({"train": {"clip": float("nan")}}, "clip is nan, which it cannot be"),
        ({"model": {"qk_norm": "batch"}}, "qk_norm is 'batch', which it cannot be"),
        ({"model": {"depth": 0}}, "depth is 0; it must be above 0, and finite"),
        ({"moe": {"top_k": 9}}, "top_k 9 is more than num_experts 8"),
        (
            {"max_steps": 901},
            "max_steps 901 is beyond train.decay_steps",
        ),
        ([], "it holds no JSON object"),
    ],
)
def test_what_is_none_of_ours_is_refused(values: Any, sentence: str, tmp_path: Path) -> None:
    file = written(tmp_path, {**OLD, **values} if isinstance(values, dict) else values)
    with pytest.raises(ValueError, match=re.escape(f"{file} is not the configuration of a run: {sentence}")):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{file} is not a configuration that can be read: {sentence}")):
        read_file(file)


def test_the_file_of_a_run_says_where_it_is_and_what_it_saw(tmp_path: Path) -> None:
    for name in ("out", "data"):
        file = written(tmp_path, {key: value for key, value in OLD.items() if key != name})
        with pytest.raises(ValueError, match=f"is not the configuration of a run: it has no {name}"):
            read_config(tmp_path)
        assert isinstance(read_file(file), Config)  # one that was written by hand, to start from


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/config\.json is not the configuration of a run: there is no such file$"):
        read_config(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a configuration that can be read: Expecting property name"):
        read_file(tmp_path / "config.json")


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    config = replace(PRESETS["digits"], out=tmp_path)
    written(tmp_path, {key: value for key, value in to_dict(config).items() if key != "parallel"})
    check_place(config)
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 -> 1\)"):
        check_place(replace(config, seed=1))
    with pytest.raises(ValueError, match=r"holds another run \(model.depth: 4 -> 5\)"):
        check_place(replace(config, model=replace(config.model, depth=5)))


def test_differences_name_the_leaves() -> None:
    old, new = to_dict(Config()), to_dict(Config(seed=1, model=ModelConfig(depth=5)))
    assert differences(old, new) == ["model.depth: 4 -> 5", "seed: 0 -> 1"]
    assert differences(old, old) == []


def test_configurations_import_no_torch() -> None:
    code = "import ditmoe.config, ditmoe.config.file, sys; assert not {'torch', 'numpy', 'diffusers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("value", ["inf", "1e31"])
def test_what_a_command_takes_its_file_holds(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse_train(["digits", "--train.clip", value], "train.py")
    assert stopped.value.code == 2
    assert "it must be finite" in " ".join(map(str, capsys.readouterr()))


def test_a_file_that_asks_for_help_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"help": "1"}')
    with pytest.raises(SystemExit) as stopped:
        cli.parse_train([str(tmp_path / "config.json")], "train.py")
    assert stopped.value.code == 2
    assert "it has help, which is unknown" in capsys.readouterr().err


def test_a_scale_that_was_said_and_one_that_was_left_open_are_one(tmp_path: Path) -> None:
    said = replace(Config(), out=tmp_path, moe=MoEConfig(top_k=3, scale=3.0))
    save(said, tmp_path / "config.json")
    check_place(replace(said, moe=MoEConfig(top_k=3)))
    with pytest.raises(ValueError, match=r"holds another run \(moe.scale: 3.0 -> 1.0\)"):
        check_place(replace(said, moe=MoEConfig(top_k=3, scale=1.0)))

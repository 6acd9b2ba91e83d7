"""The command line: presets, overrides, saved files, mistakes with exit code 2, and how fast it answers."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ditmoe import __main__, cli
from ditmoe.config.file import save
from ditmoe.config.presets import PRESETS
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import DataConfig, TrainConfig

ROOT = Path(__file__).parents[2]
COMMANDS = ["train", "sample", "score", "encode", "export", "convert", "exposure", "analyze", "centroids", "play"]


def test_a_rule_goes_by_the_numbers_asked_for_in_any_order() -> None:
    for words in (["--moe.preset", "null", "--moe.num-experts", "32"], ["--moe.num_experts=32", "--moe.preset=null"]):
        moe = cli.parse_train(["fashion", *words]).moe
        assert (moe.num_experts, moe.null_experts, moe.top_k) == (32, 32, 4)
    moe = cli.parse_train(["fashion", "--moe.preset", "nucleus", "--moe.top-k", "3"]).moe
    assert (moe.top_k, moe.capacity_start) == (3, 6.0)
    moe = cli.parse_train(["fashion", "--moe.preset", "mumoe", "--moe.expert-width", "64", "--moe.top-k=4"]).moe
    assert (moe.expert_width, moe.top_k) == (256, 1)  # K F, as wide as what is active
    moe = cli.parse_train(["digits", "--moe.preset", "null", "--moe.num-experts", "4", "--moe.top_k", "1"]).moe
    assert (moe.null_experts, moe.top_k) == (4, 2)
    moe = cli.parse_train(["digits", "--moe.preset", "deepseek", "--moe.groups", "2", "--moe.top-k", "3"]).moe
    assert (moe.groups, moe.top_k) == (2, 3)  # what is typed has the last word
    moe = cli.parse_train(["digits", "--moe.preset", "switch", "--moe.top-k", "1", "--moe.no-renormalize"]).moe
    assert (moe.top_k, moe.renormalize, moe.capacity) == (1, False, 1.25)  # also where the rule needs it
    moe = cli.parse_train(["digits", "--moe.top-k=3", "--moe.preset", "null", "--moe.top-k", "1"]).moe
    assert moe.top_k == 2  # twice the last, as options go


def test_presets_and_overrides() -> None:
    config = cli.parse_train(["fashion", "--train.learning-rate", "0.5", "--moe.no-renormalize", "--out", "x"])
    assert config.train.learning_rate == 0.5
    assert not config.moe.renormalize
    assert config.out == Path("x")
    assert config.data == PRESETS["fashion"].data
    assert cli.parse_train([]) == PRESETS["digits"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_configuration_comes_back_equal(name: str, tmp_path: Path) -> None:
    config = replace(PRESETS[name], out=tmp_path, seed=7, data=DataConfig(name="folder", path=Path("a b"), flip=True))
    save(config, tmp_path / "config.json")
    assert cli.parse_train([str(tmp_path / "config.json")]) == config
    changed = cli.parse_train([str(tmp_path / "config.json"), "--seed", "8"])
    assert changed == replace(config, seed=8)


PROTOTYPE = ["digits", "--moe.router", "prototype"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fashoin"], ["fashoin", "did you mean 'fashion'"]),
        (["digits", "--train.learning-rat", "1"], ["--train.learning-rate"]),
        (["digits", "--train.batch-size", "many"], ["batch-size", "many"]),
        (["digits", "--train.batch-size", "-4"], ["batch_size is -4"]),
        (["digits", "--moe.top-k", "9"], ["top_k 9 is more than num_experts 8"]),
        (["digits", "--moe.cosine-scale", "1"], ["cosine_scale works with router prototype, not linear"]),
        (["digits", "--moe.contrastive-temperature", "1"], ["contrastive_temperature works with router prototype"]),
        (["digits", "--moe.contrastive-weight", "1"], ["contrastive_weight works with router prototype"]),
        (["digits", "--moe.score", "identity", "--moe.no-renormalize"], ["score identity works with router prototype"]),
        (
            [*PROTOTYPE, "--moe.score", "identity"],
            ["score identity cannot be renormalised"],
        ),
        ([*PROTOTYPE, "--moe.cosine-scale", "0"], ["cosine_scale is 0.0; it must be above 0"]),
        ([*PROTOTYPE, "--moe.contrastive-temperature", "0"], ["contrastive_temperature is 0.0; it must be above 0"]),
        ([*PROTOTYPE, "--moe.contrastive-weight", "-1"], ["contrastive_weight is -1.0; it must be 0 or more"]),
        ([*PROTOTYPE, "--moe.contrastive-weight", "1", "--moe.router-input", "position"], ["position sees none"]),
        (["digits", "--model.patch-size", "3"], ["sample_size 8 is not a multiple of patch_size 3"]),
        (["digits", "--model.depth", "1", "--model.long-skips"], ["long_skips joins blocks, and depth is 1"]),
        (["digits", "--max-steps", "999999"], ["decay"]),
        (["digits", "--train.compile", "true"], ["--train.compile or --train.no-compile, without a value"]),
        (["digits", "--train.no_compile", "False", "--seed", "1"], ["train.compile is a flag: write --train.compile"]),
        (["digits", "--moe.renormalize=maybe"], ["moe.renormalize is a flag: write --moe.renormalize or --moe.no"]),
        (["digits", "--dry-run", "1"], ["dry-run is a flag: write --dry-run or --no-dry-run, without a value"]),
        (["digits", "--train.compile", ""], ["train.compile is a flag: write --train.compile or --train.no-compile"]),
        (["--dry-run", "fashion", "--seed", "3"], ["the preset comes first: train.py fashion --dry-run --seed 3"]),
        (["models/fashion"], ["models/fashion is an exported model; models/fashion/training.json is how it was"]),
        (["digits", "--objective.learn-sigma"], ["learn_sigma works with prediction_type epsilon"]),
        (["nowhere/config.json"], ["nowhere/config.json", "cannot be read", "not a configuration"]),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(
    argv: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse_train(argv)
    assert stopped.value.code == 2
    error = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert any(word in error for word in words), error
    assert "Traceback" not in error


def test_a_typo_in_a_saved_file_is_caught(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(PRESETS["digits"], tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    values["train"]["learning_rte"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as stopped:
        cli.parse_train([str(tmp_path / "config.json")])
    assert stopped.value.code == 2
    assert "learning-rte" in capfd.readouterr().err


def test_errors_become_exit_codes(capfd: pytest.CaptureFixture[str]) -> None:
    from ditmoe.launch.signals import Interrupted

    def fail(error: BaseException) -> int:
        def main() -> None:
            raise error

        return cli.run(main)

    assert fail(ValueError("label 12 is out of range")) == 2
    assert capfd.readouterr().err == "error: label 12 is out of range\n"
    assert fail(Interrupted("saved")) == 143
    with pytest.raises(KeyError):
        fail(KeyError("a bug"))


def test_a_saved_file_is_refused_in_the_words_of_flags_or_of_its_reader(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for values, words in (
        ({"model": {"depht": 3}}, "Unrecognized options: --model.depht, 3"),
        ({"model": {"hidden_size": 100}}, "Error parsing model: hidden_size 100 must be a multiple of"),
        ({"modle": {}}, "it has modle, which is unknown; did you mean 'model'?"),
        ([], "config.json is not a configuration that can be read: it holds no JSON object"),
        ({"train": {"compile": "true"}}, "compile is 'true', which it cannot be"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(SystemExit) as stopped:
            cli.parse_train([str(tmp_path)])
        assert stopped.value.code == 2
        assert words in " ".join(capfd.readouterr().err.replace("│", " ").split())


def typed(monkeypatch: pytest.MonkeyPatch, program: str, *words: str) -> int:
    """The exit code of the command `ditmoe`, installed as `program`."""
    monkeypatch.setattr(sys, "argv", [program, *words])
    try:
        return __main__.main()
    except SystemExit as end:
        return int(end.code or 0)


def test_the_command_lists_its_commands(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert typed(monkeypatch, "/bin/ditmoe", *words) == 0
        usage, _, *lines, _, _ = capfd.readouterr().out.splitlines()
        assert usage == "usage: ditmoe COMMAND ..."
        assert [line.split()[0] for line in lines] == COMMANDS
    assert typed(monkeypatch, "/bin/ditmoe", "trian", "digits") == 2
    sentence = "error: there is no command 'trian'; did you mean 'train'? commands are "
    assert capfd.readouterr().err == f"{sentence}{', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("command", ["train digits", *COMMANDS[1:]])
@pytest.mark.parametrize(
    ("program", "called"), [("/bin/ditmoe", "ditmoe"), ("/site/ditmoe/__main__.py", "python -m ditmoe")]
)
def test_a_command_is_called_what_was_typed(
    program: str, called: str, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, program, *command.split(), "--help") == 0
    assert capfd.readouterr().out.startswith(f"usage: {called} {command} [-h] ")
    assert typed(monkeypatch, program, *command.split(), "--nonsense", "1") == 2
    assert f"{called} {command} --help" in " ".join(capfd.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    "argv",
    [
        *(["train.py", "--help"], ["train.py", "digit"], ["sample.py", "--help"], ["sample.py"]),
        *(["-m", "ditmoe"], ["-m", "ditmoe", "tain"], ["-m", "ditmoe", "exposure", "m", "--num", "0"]),
        *(["-m", "ditmoe", command, "--help"] for command in COMMANDS),
    ],
    ids=" ".join,
)
def test_help_and_mistakes_answer_before_torch_is_imported(argv: list[str]) -> None:
    words = argv[1:] if argv[0] == "-m" else argv
    way = "run_module({!r}, None, '__main__', True)" if argv[0] == "-m" else "run_path({!r}, None, '__main__')"
    code = (
        f"import runpy, sys; sys.argv = {words!r}\n"
        f"try: runpy.{way.format(words[0])}\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in argv or argv[1:] == ["ditmoe"] else 2), done.stderr
    assert time.perf_counter() - start < 5  # under a second on a quiet machine


def test_sample_arguments() -> None:
    args = cli.parse(SampleArgs, ["models/fashion", "--classes", "3", "7", "7", "--cfg", "2", "--out", "a.npz"])
    assert args.classes == (3, 7, 7)
    assert (args.cfg, args.out, args.model) == (2.0, Path("a.npz"), Path("models/fashion"))
    assert cli.parse(SampleArgs, ["--compile", "models/fashion"]).compile
    for wrong in (["m", "--num", "0"], ["m", "--num", "2", "--classes", "1"], ["m", "--compile", "yes"]):
        with pytest.raises(SystemExit) as stopped:
            cli.parse(SampleArgs, wrong)
        assert stopped.value.code == 2


def test_sampler_options_are_those_that_were_given() -> None:
    assert cli.parse(SampleArgs, ["m"]).sampler_options() == {}
    asked = ["m", "--exposure-window", "40", "--exposure-variance", "0.3", "--flow-shift", "3"]
    options = {"exposure_window": 40, "exposure_variance": 0.3}
    assert cli.parse(SampleArgs, asked).flow_shift == 3
    assert cli.parse(SampleArgs, asked).sampler_options() == options
    assert cli.parse(SampleArgs, ["m", "--exposure-variance", "calibrated"]).exposure_variance == "calibrated"
    with pytest.raises(ValueError, match="exposure_variance 'lots' is neither"):
        SampleArgs(Path("m"), exposure_variance="lots")


def test_checks_of_single_values() -> None:
    with pytest.raises(ValueError, match="ema_decay is 1.5"):
        TrainConfig(ema_decay=1.5)


def test_a_place_that_is_not_the_users_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise PermissionError(13, "Permission denied", "/root/x.json")

    assert cli.run(write) == 2
    assert capsys.readouterr().err == "error: /root/x.json cannot be read or written: you may not; give another place\n"


def test_more_images_than_anyone_draws_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="num is 99999999999999; it must be at most 10000000"):
        SampleArgs(Path("models/digits"), num=99999999999999)

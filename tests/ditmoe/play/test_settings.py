"""The words of an address, and the command and the Python that draw the same."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from ditmoe import cli
from ditmoe.config.policy import Policy
from ditmoe.config.sample import SampleArgs
from ditmoe.play import settings
from tests.ditmoe.moe.test_policy import made
from tests.ditmoe.pipeline.test_pipeline import make

MODEL = Path("models/a b")
QUERY = {
    "classes": ["Sneaker", "3", "T-shirt/top"], "seed": ["7"], "sampler": ["ddim"], "steps": ["4"], "cfg": ["2.5"],
    "guidance-interval": ["100", "800"], "guide": ["experts-off"], "guide-scale": ["1.5"], "eta": ["0.5"],
    "tau": ["0-500=0.3", "500-1000=0.4"],
}  # fmt: skip


def test_an_address_has_the_words_of_the_command_line() -> None:
    args, policy = settings.read(QUERY, MODEL)
    assert args.classes == ("Sneaker", 3, "T-shirt/top")
    assert (args.guidance_interval, args.seed, policy) == ((100.0, 800.0), 7, None)
    assert settings.read({**QUERY, "policy": ['{"rules": []}']}, MODEL)[1] is None
    words = shlex.split(settings.command(QUERY, args, policy))[4:]
    assert args.precision == "fp32"
    assert cli.parse(SampleArgs, words) == SampleArgs(**{**vars(args), "out": Path("drawn.png")})


def test_a_policy_is_written_before_it_is_used(tmp_path: Path) -> None:
    rules = {"rules": [{"layer": 1, "expert": 2, "action": "suppress"}]}
    query = {"classes": ["1"], "policy": [json.dumps(rules)]}
    _, policy = settings.read(query, MODEL)
    assert policy == Policy.from_dict(rules)
    write, draw = settings.command(query, *settings.read(query, MODEL)).splitlines()
    subprocess.run(write, shell=True, cwd=tmp_path, check=True)
    (file,) = tmp_path.glob("policy-*.json")
    assert Policy.read(file) == policy
    rest = f"--classes 1 --policy {file.name} --precision fp32 --out drawn.png"
    assert draw == f"python -m ditmoe sample 'models/a b' {rest}"
    other = {**query, "policy": [json.dumps(rules).replace("2", "3")]}
    assert file.name not in settings.command(other, *settings.read(other, MODEL))
    assert f"    policy={rules!r},\n" in settings.python(query, *settings.read(query, MODEL))


def test_the_python_has_the_names_of_the_call() -> None:
    query = {"classes": ["Bag"], "steps": ["4"], "guidance-interval": ["0", "800"]}
    said = settings.python(query, *settings.read(query, MODEL))
    assert "pipeline.load(Path('models/a b'), fast=True)" in said
    assert (
        "pipe(\n    class_labels=['Bag'],\n    num_inference_steps=4,\n    guidance_interval=(0.0, 800.0),\n)" in said
    )
    compile(settings.python(QUERY, *settings.read(QUERY, MODEL)), "copied", "exec")


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"stepz": ["3"]}, "there is no setting 'stepz'; did you mean 'steps'"),
        ({"out": ["/etc/passwd"]}, "there is no setting 'out'"),
        ({"steps": ["many"]}, "steps is 'many'; give a whole number"),
        ({"steps": ["0"]}, "steps is 0; it must be 1 or more"),
        ({"steps": ["3", "4"]}, "steps has 2 values"),
        ({"guidance-interval": ["3"]}, "guidance-interval has 1 value; give two numbers"),
        ({"guide": ["/some/folder"]}, "guide is '/some/folder'; give experts-off or none"),
        ({"policy": ["{"]}, "policy is '{'; give one JSON object"),
        ({"policy": ["[]"]}, "it must be {"),
        ({"policy": ['{"rules": [{"layer": 1, "expert": 0, "action": "burn"}]}']}, "action is 'burn'"),
        ({"policy": [json.dumps({"rules": [None] * 1001})]}, "policy has 1001 rules; a page draws by up to 1000"),
        ({"classes": ["1"] * 17}, "classes asks for 17 images; a page draws up to 16"),
        ({}, "no image is asked for"),
    ],
)
def test_what_an_address_cannot_have_is_a_sentence(query: dict[str, list[str]], sentence: str) -> None:
    common = {} if not query or "classes" in query else {"classes": ["1"]}
    with pytest.raises(ValueError, match=sentence.replace("{", r"\{").replace("[", r"\[")):
        settings.read({**common, **query}, MODEL)


def test_classes_go_by_their_names_where_these_are_plain() -> None:
    names = {0: "Bag", 1: "7", 2: "-x", 3: "twice", 4: "twice", 6: "007"}
    assert [settings.word_of(label, names) for label in range(7)] == ["Bag", "1", "2", "3", "4", "5", "007"]
    assert settings.read({"classes": ["007", "7"]}, MODEL)[0].classes == ("007", 7)


def test_what_a_page_is_told_of_a_model() -> None:
    told = settings.described(make(), MODEL)
    assert told["classes"][1] == ["class 1", "class 1", "1"]
    assert (told["layers"], told["experts"], told["side"], told["size"]) == ([1], 4, 2, 8)
    assert told["defaults"]["steps"] == 4
    assert settings.described(make(num_classes=0), MODEL)["classes"] == []
    factorised = made(
        experts="factorised", select="dense", score="entmax", renormalize=False, top_k=1, balance_weight=0
    )
    actions = [settings.described(pipe, MODEL)["actions"] for pipe in (make(), factorised)]
    assert actions == [["suppress", "force"], ["suppress"]]

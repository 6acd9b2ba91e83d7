"""A folder that diffusers reads where ditmoe is not installed, and the card that goes with a model."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ditmoe import pipeline
from ditmoe.cli import parse
from ditmoe.config.convert import ExportArgs
from ditmoe.convert.export import export
from tests.ditmoe.test_saved_files import SAVED

RUN = SAVED / "by-token"
ELSEWHERE = """
import sys
sys.modules |= dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp"))  # as on Windows
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import importlib.util
assert importlib.util.find_spec("ditmoe") is None and importlib.util.find_spec("samplers") is None
import diffusers, numpy
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
numpy.save(sys.argv[2], pipe([3, 7], seed=5, num_inference_steps=3, sampler="ddim", output_type="np").images)
"""


def front(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_diffusers_draws_the_same_where_ditmoe_is_not_installed(tmp_path: Path) -> None:
    gift = tmp_path / "gift"
    export(ExportArgs(RUN, gift, dtype="float32"))
    expected = pipeline.load(gift)([3, 7], seed=5, num_inference_steps=3, sampler="ddim", output_type="np").images
    export(ExportArgs(RUN, gift, dtype="float32", standalone=True, force=True))
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(gift), str(tmp_path / "x.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"HF_HOME": str(tmp_path / "hf")})
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    assert "trust_remote_code=True" in (gift / "README.md").read_text()
    with pytest.raises(ValueError, match=r"model_index.json has _class_name .*, which is not ditmoe's"):
        pipeline.load(gift)


def test_a_model_that_was_exported_is_exported_again(tmp_path: Path) -> None:
    export(ExportArgs(RUN, tmp_path / "gift", dtype="float32", license="mit"))
    export(ExportArgs(tmp_path / "gift", tmp_path / "again", dtype="float32", standalone=True))
    assert (tmp_path / "again" / "pipeline.py").is_file()
    for name in ("training.json", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "gift" / name).read_bytes()
    page = (tmp_path / "again" / "README.md").read_text()
    assert page.startswith((tmp_path / "gift" / "README.md").read_text().rstrip())
    assert f"python -m ditmoe export {tmp_path / 'gift'} {tmp_path / 'again'} --dtype float32 --standalone" in page
    assert "trust_remote_code=True" in page
    assert front(tmp_path / "again")["license"] == "mit"
    with pytest.raises(ValueError, match="license is other, but .*README.md stays; leave it out"):
        export(ExportArgs(tmp_path / "gift", tmp_path / "b", license="other"))


def test_the_card_says_licence_and_score_with_its_protocol(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = tmp_path / "run"
    run.mkdir()
    for part in RUN.iterdir():
        (run / part.name).symlink_to(part)
    score = {"metric": "fd_x", "value": 1.5, "n_gen": 12, "n_ref": 16, "extractor": {"name": "x"}, "resize": "no"}
    report = {
        "score": score, "data": {"name": "digits", "source": "s"}, "sampling": {"sampler": "ddim", "steps": 5},
        "model": {"parameters_total": 1, "parameters_activated": 1}, "training": {"steps": 4, "batch_size": 2},
    }  # fmt: skip
    (run / "report.json").unlink(missing_ok=True)
    (run / "report.json").write_text(json.dumps(report))
    export(ExportArgs(run, tmp_path / "gift", license="cc-by-4.0"))
    read = front(tmp_path / "gift")
    assert (read["library_name"], read["license"]) == ("diffusers", "cc-by-4.0")
    assert {"ditmoe", "mixture-of-experts"} <= {*read["tags"]}
    [result] = read["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 1.5
    assert result["metrics"][0]["args"]["n_gen"] == 12
    assert result["metrics"][0]["args"]["sampling"] == {"sampler": "ddim", "steps": 5}
    data = ModelCard.load(tmp_path / "gift" / "README.md").data  # which takes the results apart and checks them
    assert data.eval_results[0].metric_value == 1.5


@pytest.mark.parametrize("word", ["MIT", "Apache 2.0", "", "mit\nlicense: other"])
def test_a_licence_is_spelled_as_the_hub_spells_it(word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="license is .*; give it as the Hub spells it, in small letters"):
        ExportArgs(RUN, tmp_path / "gift", license=word)


def test_the_cards_command_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    export(ExportArgs(RUN, tmp_path / "a gift"))
    page = (tmp_path / "a gift" / "README.md").read_text()
    (typed,) = [line for line in page.splitlines() if line.startswith("python -m ditmoe export")]
    assert parse(ExportArgs, shlex.split(typed)[4:]) == ExportArgs(RUN, tmp_path / "a gift")
    (drawn,) = [line.split("`")[1] for line in page.splitlines() if "ditmoe sample" in line]
    assert shlex.split(drawn)[:5] == ["python", "-m", "ditmoe", "sample", str(tmp_path / "a gift")]


def test_without_a_score_there_is_none_and_the_licence_is_unknown(tmp_path: Path) -> None:
    export(ExportArgs(RUN, tmp_path / "gift"))
    read = front(tmp_path / "gift")
    assert read["license"] == "unknown"
    assert "model-index" not in read


def test_a_push_goes_to_the_hub_or_says_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    sent: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: sent.append((name, options)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: sent.append(options))
    export(ExportArgs(RUN, tmp_path / "gift", push="me/gift"))
    assert sent == [
        ("me/gift", {"exist_ok": True, "private": True}),
        {"repo_id": "me/gift", "folder_path": tmp_path / "gift"},
    ]

    def fails(**options: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "upload_folder", fails)
    what = f"push me/gift: {tmp_path / 'b'} is finished, but the Hub did not take it (no network); hf auth login"
    with pytest.raises(ValueError, match=re.escape(what)):
        export(ExportArgs(RUN, tmp_path / "b", push="me/gift"))
    with pytest.raises(ValueError, match="push is 'gift'; give OWNER/NAME"):
        ExportArgs(RUN, tmp_path / "c", push="gift")

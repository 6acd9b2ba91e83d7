"""A guide from wherever it lies, and what is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe import pipeline
from ditmoe.config.sections import Config, ModelConfig, ObjectiveConfig
from ditmoe.model import build
from ditmoe.run_folder import writer
from ditmoe.run_folder.network import load_guide
from tests.ditmoe.pipeline.test_pipeline import make
from tests.ditmoe.test_saved_files import RUNS, SAVED

STEP = Path("checkpoints/step-000004")


@pytest.mark.parametrize("name", RUNS)
def test_run_model_and_checkpoint_hold_one_network(name: str) -> None:
    wanted = pipeline.load(SAVED / name).transformer
    x, t = torch.randn(2, *(wanted.config[k] for k in ("in_channels", "sample_size", "sample_size"))), torch.tensor(300)
    for path in (SAVED / name, SAVED / name / "model", SAVED / name / STEP):
        net = load_guide(path, pipeline.load(SAVED / name))
        assert not net.training
        with torch.no_grad():
            assert torch.equal(net(x, t).sample, wanted(x, t).sample)
        settings = [{k: v for k, v in each.config.items() if not k.startswith("_")} for each in (net, wanted)]
        assert settings[0] == settings[1]


def test_slices_of_a_checkpoint_become_one_network(tmp_path: Path) -> None:
    from tests import checkpoints

    whole = SAVED / "by-token" / STEP
    parts, state = checkpoints.load(whole)
    split = {key for key in parts["ema"] if "experts" in key}
    halves = {
        f"ema.shard-{i}": {key: value.chunk(2)[i] for key, value in parts["ema"].items() if key in split}
        for i in (0, 1)
    }
    rest = {key: value for key, value in parts["ema"].items() if key not in split}
    writer.save(tmp_path, 4, {"ema": rest, **halves}, {k: v for k, v in state.items() if k != "step"})
    pipe = pipeline.load(SAVED / "by-token")
    net = load_guide(tmp_path / "step-000004", pipe)
    assert split
    for key, value in load_guide(whole, pipe).state_dict().items():
        assert torch.equal(net.state_dict()[key], value)


def cut(path: Path) -> None:
    (path / "ema.safetensors").write_bytes((path / "ema.safetensors").read_bytes()[:-4])


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A checkpoint that is whole, of another state."""

    def write(path: Path) -> None:
        from tests import checkpoints

        parts, state = checkpoints.load(path)
        change(state)
        shutil.rmtree(path)
        writer.save(path.parent, 4, parts, {k: v for k, v in state.items() if k != "step"})

    return write


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (shutil.rmtree, "step-000004 does not exist; give a model folder, a run folder, RUN/checkpoints/step-000123,"),
        (cut, r"checkpoint .*step-000004 is damaged \(ema\.safetensors has \d+ bytes, not \d+\); give another"),
        (
            lambda path: (path / "state.json").unlink(),
            r"checkpoint .*step-000004 is damaged \(state\.json is missing\)",
        ),
        (rewritten(lambda state: state.pop("config")), "holds no network that can be built .*config"),
        (
            rewritten(lambda state: state["config"]["model"].update(hidden_size=16)),
            "its weights are not those that its configuration asks for",
        ),
        (rewritten(lambda state: state["config"]["model"].update(depth=10**9)), "it has far more tensors than its"),
        (rewritten(lambda state: state["config"]["model"].update(depth="2")), "depth is '2', which it cannot be"),
    ],
)
def test_what_is_no_whole_checkpoint(tmp_path: Path, change: Callable[[Path], None], sentence: str) -> None:
    shutil.copytree(SAVED / "by-token" / STEP, tmp_path / "step-000004")
    change(tmp_path / "step-000004")
    with pytest.raises(ValueError, match=sentence):
        load_guide(tmp_path / "step-000004", pipeline.load(SAVED / "by-token"))


def test_a_folder_without_a_model_is_no_guide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        load_guide(tmp_path, make())


@pytest.mark.parametrize(("kind", "refused"), [("epsilon", True), ("flow_prediction", False)])
def test_a_guide_of_another_noise_schedule(tmp_path: Path, kind: Any, refused: bool) -> None:
    betas = "linear" if kind == "flow_prediction" else "squaredcos_cap_v2"
    objective = ObjectiveConfig(prediction_type=kind, beta_schedule=betas)  # type: ignore[arg-type]
    config = Config(model=ModelConfig(hidden_size=16, depth=1, num_heads=2), objective=objective)
    pipeline.save(pipeline.assemble(build(config, 4), config, {}), tmp_path / "model")
    if refused:
        with pytest.raises(ValueError, match="has beta_schedule squaredcos_cap_v2, but the model has linear; give one"):
            load_guide(tmp_path, make())
    else:
        assert json.loads((tmp_path / "model/transformer/config.json").read_text())["prediction_type"] == kind
        assert load_guide(tmp_path, make()).config.prediction_type == kind


def test_a_model_folder_may_be_called_like_a_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(SAVED / "by-token" / "model", tmp_path / "step-5000")
    assert load_guide(tmp_path / "step-5000", pipeline.load(SAVED / "by-token")).config.depth > 0


def test_a_guide_of_other_latents(tmp_path: Path) -> None:
    one, other = ({"vae": {"name": "a", "sha256": "0" * 64}, "mean": [m], "std": [1.0]} for m in (0.0, 0.5))
    pipe, guide = make(), make()
    pipe.register_to_config(latents=one)
    for latents in (one, other):
        guide.register_to_config(latents=latents)
        pipeline.save(guide, tmp_path / str(latents["mean"][0]))
    assert load_guide(tmp_path / "0.0", pipe) is not None
    with pytest.raises(ValueError, match="is of other latents than the model"):
        load_guide(tmp_path / "0.5", pipe)

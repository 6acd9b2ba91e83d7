"""From a folder of photos to a score: encoded on two processes, trained on two with split experts, sampled on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ditmoe.data.test_latents import save_vae
from tests.doors import typed
from tests.processes import door, start

ROOT = Path(__file__).parents[2]
TINY = ["--model.hidden-size", 32, "--model.depth", 2, "--model.num-heads", 2, "--moe.num-experts", 4,
        "--moe.expert-width", 16, "--moe.shared-width", 16, "--model.ffn-width", 48, "--model.sample-size", 8,
        "--train.batch-size", 8, "--sample.num", 8, "--sample.steps", 2]  # fmt: skip


def launched(*argv: object, flags: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def launch_here(words: list[str]) -> None:
    """`accelerate launch WORDS` in a process of `start`, which itself becomes the `python train.py` that it begins."""
    for name in [name for name in sys.modules if name.startswith("accelerate.commands")]:
        del sys.modules[name]  # they look where the default file is when they are imported
    from accelerate.commands import launch

    def become(command: list[str], env: dict[str, str]) -> None:
        assert command[:2] == [sys.executable, "train.py"]
        os.environ.clear()
        os.environ.update(env)
        door("train", command[2:])

    launch.subprocess.Popen = become
    launch.launch_command(launch.launch_command_parser().parse_args(words))


def test_from_photos_to_a_score(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(path)
    vae, latents, run, model = save_vae(tmp_path / "vae", 0), tmp_path / "latents", tmp_path / "run", tmp_path / "model"
    sizes = ["--size", 16, "--shard-size", 4]
    encoded = typed("ditmoe", "encode", tmp_path / "photos", "--vae", vae, "--out", latents, *sizes, world=2)
    assert encoded.returncode == 0, encoded.stderr
    assert "4 of 4 shards to encode on 2 process(es)" in encoded.stdout
    argv = ["train.py", "imagenet-256-s", "--data.path", latents, "--model.num-classes", 2, *TINY,
            "--max-steps", 4, "--parallel.experts", 2, "--out", run]  # fmt: skip
    trained = launched(*argv, flags=("--config_file", "launch/cpu-2.yaml", "--main_process_port", 0))
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("training on 2 process(es)") == 1
    assert sorted(p.name for p in (run / "checkpoints" / "step-000004").glob("ema.*")) == [
        "ema.safetensors", "ema.shard-0.safetensors", "ema.shard-1.safetensors",
    ]  # fmt: skip
    bare = typed("sample", run, "--num", 2, "--steps", 1, "--out", tmp_path / "set")
    assert (bare.returncode, (tmp_path / "set").exists()) == (2, False)
    assert "makes latents of 4 channels and holds no VAE" in bare.stderr
    exported = typed("ditmoe", "export", run, model, "--vae", vae)
    assert exported.returncode == 0, exported.stderr
    drawn = typed("sample", model, "--num", 12, "--steps", 2, "--out", tmp_path / "set")
    assert drawn.returncode == 0, drawn.stderr
    scored = typed("eval.fid", tmp_path / "set", "--ref", tmp_path / "set", "--no-cache", "--out", tmp_path / "s.json")
    assert scored.returncode == 0, scored.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["n_gen"] == 12
    assert report["generation"]["checkpoint"]["steps"] == 4
    assert report["value"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("told", ["by flags", "by a file", "by the default file"])
def test_a_launch_that_fell_back_to_one_process_is_refused(told: str, tmp_path: Path) -> None:
    known = {"num_processes": 2, "use_cpu": True, "distributed_type": "MULTI_CPU", "num_machines": 1}
    asked = tmp_path / "accelerate" / "default_config.yaml"  # as `accelerate config` leaves it
    asked.parent.mkdir()
    asked.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in known.items()))
    flags = {"by flags": ["--cpu", "--num_processes", "2"], "by a file": ["--config_file", str(asked)]}.get(told, [])
    argv = ["train.py", "digits", "--max-steps", "1", "--out", str(tmp_path / "run")]
    home = {"HF_HOME": str(tmp_path)} if told == "by the default file" else {}
    group = start(launch_here, [*flags, *argv], folder=tmp_path / "printed", env=home)
    assert group.wait() == [2]
    assert "the launch was asked for several processes (MASTER_PORT is set) and has started 1" in group.err()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_launches_in_a_row_exit_with_0(tmp_path: Path) -> None:
    """gloo may abort a program that has finished, while its interpreter ends; so these are no forks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for steps in range(1, 21):  # one run, prolonged twenty times
        argv = [*command, "digits", *TINY[:-6], "--train.batch-size", 8, "--sample.num", 8, "--sample.steps", 2,
                "--max-steps", steps, "--out", tmp_path / "run", "--parallel.experts", 1 + steps % 2]  # fmt: skip
        done = subprocess.run([*map(str, argv)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "training on 2 process(es)" in done.stdout

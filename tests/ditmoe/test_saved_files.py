"""Runs and models that an earlier version saved are still read, drawn from and gone on with."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditmoe.config.file import read_config
from ditmoe.data.open import open_data
from ditmoe.pipeline import load
from ditmoe.training.loop import train

SAVED = Path(__file__).parents[1] / "saved"
RUNS = ("by-token", "by-place")


def drawn(folder: Path) -> np.ndarray:
    pipe = load(folder)
    pipe.set_progress_bar_config(disable=True)
    images: np.ndarray = pipe([3, 7, 1], seed=5, output_type="pt").images.numpy()
    return images


@pytest.mark.parametrize("name", RUNS)
def test_an_older_model_draws_the_same_images(name: str) -> None:
    expected = np.load(SAVED / name / "expected.npz", allow_pickle=False)["images"]
    np.testing.assert_allclose(drawn(SAVED / name), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_an_older_run_goes_on(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(SAVED / name, run)
    config = replace(read_config(run), out=run, max_steps=6)
    torch.manual_seed(1)  # of no influence
    assert train(config, open_data(config.data, size=8, channels=1))
    assert "resumed at step 4 of 6" in capsys.readouterr().out
    expected = np.load(SAVED / name / "expected.npz", allow_pickle=False)["after_six_steps"]
    np.testing.assert_allclose(drawn(run), expected, rtol=1e-3, atol=1e-3)
    assert not np.allclose(expected, np.load(SAVED / name / "expected.npz")["images"], atol=1e-3)  # the steps count

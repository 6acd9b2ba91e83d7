"""Pictures are drawn whatever backend of matplotlib the environment names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DRAW = """
import os
from pathlib import Path
import numpy as np
from ditmoe.analysis.exposure import Reading, plot
from ditmoe.generate.pictures import write_grid
from ditmoe.report.charts import loss_curve
from eval.sweep import load_matplotlib
load_matplotlib()
loss_curve([{"step": i, "loss": 1.0, "mse": 1.0} for i in range(3)], Path("loss.png"))
write_grid(np.zeros((2, 8, 8, 1), np.uint8), None, {}, Path("grid.png"))
plot({"ddim": [Reading(1.0, 1.0, 1.0)]}, Path("exposure.png"))
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.get_backend())
"""


@pytest.mark.parametrize(
    ("named", "found"), [("module://not_there.backend_inline", None), ("svg", "svg"), ("nonsense", None)]
)
def test_pictures_are_drawn_under_any_backend(tmp_path: Path, named: str, found: str | None) -> None:
    env = {**os.environ, "MPLBACKEND": named, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DRAW], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, backend = done.stdout.split()
    assert told == named
    assert found in (None, backend)  # one that is there stays the user's
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "grid.png", "exposure.png"}

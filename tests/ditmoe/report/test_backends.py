"""Pictures are drawn whatever backend of matplotlib the environment names."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
BACKENDS = {"module://not_there.backend_inline": None, "svg": "svg", "nonsense": None}  # as named, as found
DRAW = """
import os, sys
from pathlib import Path
import numpy as np
from ditmoe.analysis.exposure import Reading, plot
from ditmoe.generate.pictures import write_grid
from ditmoe.report.charts import loss_curve
from eval.sweep import load_matplotlib
assert "matplotlib" not in sys.modules  # so that each of the forks below is the first to import it
for number, named in enumerate(sys.argv[1:]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    os.environ["MPLBACKEND"] = named
    os.mkdir(f"{number}")
    os.chdir(f"{number}")
    load_matplotlib()
    loss_curve([{"step": i, "loss": 1.0, "mse": 1.0} for i in range(3)], Path("loss.png"))
    write_grid(np.zeros((2, 8, 8, 1), np.uint8), None, {}, Path("grid.png"))
    plot({"ddim": [Reading(1.0, 1.0, 1.0)]}, Path("exposure.png"))
    import matplotlib
    print(os.environ["MPLBACKEND"], matplotlib.get_backend(), flush=True)
    os._exit(0)
"""


def test_pictures_are_drawn_under_any_backend(tmp_path: Path) -> None:
    env = {**os.environ, "MPLBACKEND": next(iter(BACKENDS)), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRAW, *BACKENDS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, (line, (named, found)) in enumerate(zip(done.stdout.splitlines(), BACKENDS.items(), strict=True)):
        told, backend = line.split()
        assert told == named
        assert found in (None, backend)  # one that is there stays the user's
        assert {p.name for p in (tmp_path / str(number)).iterdir()} == {"loss.png", "grid.png", "exposure.png"}

"""Tiny models and runs, and programs that stand still at a certain place until a test ends them."""

import io
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.processes import door


def save_model(folder, classes=2):
    """A pipeline with random weights, for 8x8 grey images."""
    from ditmoe import pipeline
    from ditmoe.config.sections import Config, ModelConfig, MoEConfig, SampleConfig
    from ditmoe.model import build

    config = Config(
        out=folder.parent,
        model=ModelConfig(sample_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, ffn_width=48),
        moe=MoEConfig(num_experts=4, expert_width=16, shared_width=16),
        sample=SampleConfig(steps=2, num=4),
    )
    torch.manual_seed(0)
    model = build(config, classes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pipeline.save(pipeline.assemble(model, config, {i: f"class {i}" for i in range(classes)}), folder)
    return config


def save_run(out, names, command):
    """A finished run on a folder of few images, without its page."""
    from dataclasses import replace

    from ditmoe.config.file import to_dict
    from ditmoe.config.sections import DataConfig

    photos = out.parent / "photos"
    for name in names:
        (photos / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(photos / name / f"{i}.png")
    config = replace(save_model(out / "model", len(names)), out=out, data=DataConfig(name="folder", path=photos))
    index = json.loads((out / "model/model_index.json").read_text())
    index["id2label"] = {str(i): name for i, name in enumerate(sorted(names))}
    (out / "model/model_index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(to_dict(config)))
    (out / "command.txt").write_text(command + "\n")
    return out


def halted(name, argv, place, flag, rank=None):
    """The door NAME, standing still at `place` after it has made the file `flag`.

    With `rank`, only that process does; the others make it once they wait for that one.
    """
    if rank in (None, int(os.environ.get("RANK", "0"))):
        PLACES[place](lambda: halt(flag) if rank is None else time.sleep(1000))
    else:
        in_a_gathering(Path(flag).touch)
    if name == "page":
        from ditmoe.report import write as report

        report.write(Path(argv[0]))
    else:
        door(name, argv)


def halt(flag):
    Path(flag).touch()
    while not Path(flag).with_name("killed").exists():  # a thread beside the main one gets no signal
        time.sleep(0.01)


def by_halves(save, file, here):
    """Half of what `save` writes, `here()`, the other half."""
    save(whole := io.BytesIO())
    data = whole.getvalue()
    file.write(data[: len(data) // 2])
    if here is not None:
        file.flush()
        here()
    file.write(data[len(data) // 2 :])


def in_a_picture(here):
    """Half of the 50th picture is in its file."""
    save, calls = Image.Image.save, [0]

    def half(self, file, **options):
        calls[0] += 1
        by_halves(lambda out: save(self, out, **options), file, here if calls[0] == 50 else None)

    Image.Image.save = half


def in_a_part(here):
    """Half of the sixth batch is in its file."""
    save, calls = np.save, [0]

    def half(file, array):
        calls[0] += 1
        by_halves(lambda out: save(out, array), file, here if calls[0] == 6 else None)

    np.save = half


def in_the_join(here):
    """A few batches have been copied into the .npz."""
    load, calls = np.load, [0]

    def counted(*args, **options):
        calls[0] += 1
        if calls[0] == 4:
            here()
        return load(*args, **options)

    np.load = counted


def in_the_clearing(here):
    """The .npz is finished, and some of its parts are removed."""
    import shutil

    remove = shutil.rmtree

    def some(folder, **options):
        if str(folder).endswith(".done") and folder.exists():
            next(folder.glob("*.npy")).unlink()
            here()
        remove(folder, **options)

    shutil.rmtree = some


def before_a_name(*names):
    """A file is written and about to get its name."""

    def place(here):
        replace = Path.replace

        def waiting(self, target):
            if Path(target).name in names:
                here()
            return replace(self, target)

        Path.replace = waiting

    return place


def in_a_sync(here):
    """The bytes of a report or of statistics are on their way to the disk."""
    os.fsync = lambda descriptor: here()


def in_the_features(here):
    """Images are being looked at."""
    from eval import measure

    measure.features_of = lambda net, batch: here()


def in_a_gathering(here):
    """A process has done its share."""
    from eval.processes import Processes

    gather = Processes.gather

    def told(self, value):
        here()
        return gather(self, value)

    Processes.gather = told


PLACES = {
    "picture": in_a_picture,
    "part": in_a_part,
    "join": in_the_join,
    "clearing": in_the_clearing,
    "note": before_a_name("sampling.json"),
    "page facts": before_a_name("report.json"),
    "page": before_a_name("index.html"),
    "sync": in_a_sync,
    "features": in_the_features,
}

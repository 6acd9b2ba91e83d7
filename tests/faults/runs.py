"""What the processes of these tests run, and how they are made to fail. Functions here are found by name in a fork."""

import json
import os
import signal
import sys
import time

from tests.processes import start

TINY = [
    *("--train.optimizer", "adamw"),  # Muon does not go with slices
    *("--model.hidden-size", "32", "--model.depth", "2", "--model.num-heads", "2", "--model.patch-size", "4"),
    *("--model.ffn-width", "48", "--moe.num-experts", "4", "--moe.expert-width", "16", "--moe.shared-width", "16"),
    *("--moe.bias-rate", "0.01", "--train.batch-size", "16", "--train.precision", "fp32", "--sample.num", "20"),
]


def training(out, *flags, hook=None, args=(), world=1, preset="digits", name="log", of_second=()):
    """A tiny run in `out`, without its page, in processes of their own; `hook(*args)` is called in each one first.

    `of_second`: further flags of the second process alone.
    """
    argv, more = ([str(a) for a in words] for words in ([preset, "--out", out, *TINY, *flags], of_second))
    return start(train_only, argv, hook, args, more, folder=out.parent / name, world=world)


def train_only(argv, hook, args, of_second=()):
    from ditmoe import cli
    from ditmoe.launch import start
    from ditmoe.training.loop import open_images, train

    def main():
        config = cli.parse_train([*argv, *(of_second if rank() == 1 else [])])
        if hook:
            hook(*args)
        try:
            train(config, open_images(config), SHOW)
        finally:
            start.shutdown()

    sys.exit(cli.run(main))


def show(step, pipe):
    """The sampling of a run, which here takes as long as it is let."""
    rank = os.environ.get("RANK", "0")
    assert rank == "0", "only the first process samples"
    print(f"sampling {step}", flush=True)
    while LINGER:
        time.sleep(0.01)


SHOW, LINGER = None, False


def lingering_samples():
    global SHOW, LINGER
    SHOW, LINGER = show, True


def rank():
    return int(os.environ.get("RANK", "0"))


def elsewhere(folder):
    """Every process in a folder of its own, as with disks that machines do not share."""
    os.chdir(os.path.join(folder, str(rank())))


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def poison(what, at_rank, steps):
    """On one rank, in the steps with these numbers (from 1): a loss, a gradient, router logits, or images of nan."""
    from ditmoe.data.order import Batches
    from ditmoe.objective import Objective
    from ditmoe.training import step

    if rank() != at_rank:
        return
    now = [0]
    forward, losses, read = step._forward, Objective.losses, Batches.__next__

    def counted(run, batch, *whole):
        now[0] += 1
        bad = now[0] in steps
        if bad and what == "router":
            weight = run.raw.blocks[1].moe.router.weight
            kept = weight.data.clone()
            weight.data[0, 0] = float("nan")
            result = forward(run, batch, *whole)
            weight.data.copy_(kept)
            return result
        result = forward(run, batch, *whole)
        if bad and what == "gradient":
            result[0]["total"].register_hook(lambda g: g * float("inf"))
        return result

    def spoilt(self, *args, **kwargs):
        found = losses(self, *args, **kwargs)
        if now[0] in steps and what == "loss":
            return {**found, "mse": found["mse"] * float("nan")}
        return found

    def next_batch(self):
        batch = read(self)
        return batch._replace(x=batch.x * float("nan")) if what == "images" and now[0] + 1 in steps else batch

    step._forward, Objective.losses, Batches.__next__ = counted, spoilt, next_batch


def full_disk(root, steps, at_rank=None, die=False):
    """Checkpoints of these steps do not fit on the disk (of one rank), or kill who writes them."""
    from ditmoe.run_folder import writer

    if at_rank not in (None, rank()):
        return
    write = writer.save_file

    def save_file(tensors, path):
        if any(f"step-{step:06d}" in str(path) for step in steps) and "ema" in str(path):
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        write(tensors, path)

    writer.save_file = save_file


def die_at(step, at_rank, number=signal.SIGKILL):
    """One rank ends in the middle of a step."""
    from ditmoe.training import step as module

    if rank() != at_rank:
        return
    forward, calls = module._forward, [0]

    def counted(run, batch, *whole):
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), number)
        return forward(run, batch, *whole)

    module._forward = counted


def signal_in(place, number):
    """The process gets a signal at a certain place of its work, at the second step or first save there is."""
    from ditmoe.run_folder import writer
    from ditmoe.training import step

    def hit():
        os.kill(os.getpid(), number)

    forward, calls, write = step._forward, [0], writer.save_file

    def counted(run, batch, *whole):
        calls[0] += 1
        if (place == "first step" and calls[0] == 1) or (place == "micro-step" and calls[0] == 6):
            hit()
        return forward(run, batch, *whole)

    def saving(tensors, path):
        if place == "save" and "step-000002" in str(path):
            hit()
        write(tensors, path)

    step._forward, writer.save_file = counted, saving


def slow_readers(seconds, at_rank):
    """Reading a file takes long, in the reader processes of one rank."""
    from torch.utils.data import get_worker_info

    from ditmoe.data.folders import FolderImages

    read_from_files()
    read = FolderImages._read

    def slow(self, file, content=None):
        if get_worker_info() and rank() == at_rank:
            time.sleep(seconds)
        return read(self, file, content)

    FolderImages._read = slow


def slow_steps(seconds):
    """A forward pass takes long."""
    from ditmoe.training import step

    forward = step._forward

    def slow(run, batch, *whole):
        time.sleep(seconds)
        return forward(run, batch, *whole)

    step._forward = slow


def slow_images(seconds):
    """Reading an image takes long."""
    from ditmoe.data.sets import ArrayImages

    tensors = ArrayImages.tensors

    def slow(self, rows, mirrored=None):
        if len(rows) in (8, 16):  # a micro-batch
            time.sleep(seconds)
        return tensors(self, rows, mirrored)

    ArrayImages.tensors = slow


def save_and_die(root, step, at):
    """A checkpoint, with the process killed at its `at`-th touch of the disk: each open, sync, rename, removal."""
    import torch

    from ditmoe.run_folder.writer import Writer

    touches = [0]

    def touched():
        touches[0] += 1
        if touches[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(root) in str(args[0]):
            touched()

    sync = os.fsync

    def fsync(descriptor):
        touched()
        sync(descriptor)
        touched()

    parts = {name: {"w": torch.full((1000,), float(step))} for name in ("model", "ema", "optimizer")}
    with Writer(root, 2, tolerant=False) as writer:
        sys.addaudithook(heard)
        os.fsync = fsync
        writer.save(step, parts, {"step": step}, wait=True)
    print(touches[0])


def read_from_files():
    """As for a folder too large for memory."""
    from ditmoe.data import open as data

    data._IN_MEMORY_BYTES = 0


def reader_fault(kind, name):
    """The process that reads the file of this name dies, raises what no image should, or has no room for its batch."""
    import resource

    from torch.utils.data import get_worker_info

    from ditmoe.data.folders import FolderImages

    read_from_files()
    read = FolderImages._read

    def faulty(self, file, content=None):
        if get_worker_info() and file.name == name:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raises":
                raise RuntimeError("decoder failed")
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as with a full /dev/shm
        return read(self, file, content)

    FolderImages._read = faulty


def checked_samples():
    """Sampling gets the whole network, with values."""

    def look(step, pipe):
        assert all(p.device.type == "cpu" and p.isfinite().all() for p in pipe.transformer.parameters())
        assert pipe.transformer.blocks[1].moe.experts.w_in.shape[0] == 4
        pipe([1, 2], num_inference_steps=2, output_type="pt")
        print(f"whole network at step {step}", flush=True)

    global SHOW
    SHOW = look


def counted_parts():
    """Say where networks are built, and how much of a checkpoint is read."""
    from ditmoe.run_folder.checkpoint import Saved
    from ditmoe.training import loop, state

    build, rows, whole, resume = state.build, Saved.rows, Saved.whole, loop.resume
    read = [0, 0]

    def built(config, num_classes):
        model = build(config, num_classes)
        print(f"built on {next(model.parameters()).device}", flush=True)
        return model

    def counted(take):
        def taken(self, *bounds):
            value = take(self, *bounds)
            read[0] += value.nbytes
            read[1] += self.shape.numel() * self.dtype.itemsize
            return value

        return taken

    def told(*args):
        found = resume(*args)
        print(f"read {read[0] / read[1]:.3f} of the checkpoint", flush=True)
        return found

    state.build, Saved.rows, Saved.whole, loop.resume = built, counted(rows), counted(whole), told


def told_dtypes():
    """Say what weights a router and its block compute with."""
    from ditmoe.model.layers import Attention
    from ditmoe.moe import Router

    def telling(name, forward, weight_of):
        def told(self, *args):
            print(f"{name} computes with {weight_of(self).dtype}", flush=True)
            return forward(self, *args)

        return told

    Router.forward = telling("Router", Router.forward, lambda router: router.weight)
    Attention.forward = telling("Attention", Attention.forward, lambda attention: attention.qkv.weight)


def stop_peer(step):
    """The second process is stopped (not ended) in the middle of a step, so that the first one waits for it."""
    from ditmoe.training import step as module

    if rank() != 1:
        return
    forward, calls = module._forward, [0]

    def counted(run, batch, *whole):
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(run, batch, *whole)

    module._forward = counted


def failing_removal():
    """Old checkpoints cannot be removed, as on a network disk where someone has their files open."""
    from ditmoe import files

    remove = files.shutil.rmtree

    def rmtree(path, ignore_errors=False):
        if "-old" not in str(path):
            remove(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    files.shutil.rmtree = rmtree


def blown_up(step, factor):
    """All weights are multiplied once: still finite, but no loss is any more."""
    import torch

    from ditmoe.training import step as module

    forward, calls = module._forward, [0]

    def counted(run, batch, *whole):
        calls[0] += 1
        if calls[0] == step:
            with torch.no_grad():
                for parameter in run.raw.parameters():
                    parameter.mul_(factor)
        return forward(run, batch, *whole)

    module._forward = counted

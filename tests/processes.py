"""Real processes for tests, without the seconds that each interpreter needs to import torch.

A fork server imports the heavy modules once; every process is forked from it, gets its own process group and writes
what it prints to files. With several processes each finds torchrun's environment.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.heavy"])
ROOT = Path(__file__).resolve().parents[1]


class Group:
    """The processes of one launch: `pids`, their exit codes, what they printed."""

    def __init__(self, function, args, world, folder, env):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
        self.members = []
        for rank in range(world):
            for name in ("out", "err"):
                (folder / f"{rank}.{name}").write_text("")
            mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            extra = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **mine, **(env or {})}
            self.members.append(CONTEXT.Process(target=_child, args=(function, args, str(folder), rank, extra)))
        for member in self.members:
            member.start()

    @property
    def pids(self):
        return [member.pid for member in self.members]

    def kill(self, number=signal.SIGKILL, rank=None):
        """Send a signal to one process, or to each one and all of its children."""
        for index, pid in enumerate(self.pids):
            if rank is None:
                os.killpg(pid, number)
            elif rank == index:
                os.kill(pid, number)

    def wait(self, timeout=120):
        """Exit codes by rank (negative: ended by that signal); fails, and ends them, when they take longer."""
        end = time.monotonic() + timeout
        for member in self.members:
            member.join(max(0.1, end - time.monotonic()))
        if any(member.is_alive() for member in self.members):
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {self.err(0)[-2000:]}")
        return [member.exitcode for member in self.members]

    def out(self, rank=0):
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank=0):
        return (self.folder / f"{rank}.err").read_text()

    def until(self, ready, timeout=90):
        """Wait until `ready()` is true, while the processes run."""
        end = time.monotonic() + timeout
        while not ready():
            assert all(member.is_alive() for member in self.members), self.err(0)[-3000:]
            assert time.monotonic() < end, f"nothing happened: {self.out(0)[-1000:]} {self.err(0)[-1000:]}"
            time.sleep(0.01)


def start(function, *args, folder, world=1, env=None):
    """Run `function(*args)`, a function of a module, in `world` new processes that print into `folder`."""
    return Group(function, args, world, Path(folder), env)


def door(name, argv):
    """What `python NAME.py ARGV` does ("train", "sample"), or `python -m eval.fid ARGV`; for `start`."""
    sys.argv = [f"{name}.py", *map(str, argv)]
    if name in ("train", "sample"):
        from ditmoe import cli

        module = __import__(name)
        sys.exit(cli.run(module.main))
    import runpy

    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _child(function, args, folder, rank, env):
    os.setpgid(0, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started by hand
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        function(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

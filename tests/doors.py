"""What a user types, in a forked process of `tests.processes`; exit code and text as `subprocess.run` has them."""

import os
import tempfile
import warnings
from subprocess import CompletedProcess

from ditmoe import __main__, cli
from tests.processes import ROOT, door, start


def typed(name, *argv, world=1, cwd=ROOT):
    """`python NAME.py ARGV` ("train", "sample") or `python -m NAME ARGV`, in `world` processes, from the folder `cwd`.

    The exit code is that of every process, the text that of all of them, by rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        group = start(_there, cwd, name, argv, folder=folder, world=world)
        codes = group.wait()
        texts = ["".join(read(rank) for rank in range(world)) for read in (group.out, group.err)]
    assert len(set(codes)) == 1, (codes, texts[1])
    return CompletedProcess([name, *map(str, argv)], codes[0], *texts)


def _there(cwd, name, argv):
    os.chdir(cwd)
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # the fork server imported it
    door(name, argv)


def command(name, *argv):
    """The exit code of `ditmoe NAME ARGV`, in this process."""
    try:
        return cli.run(lambda: __main__.COMMANDS[name]([*map(str, argv)], f"ditmoe {name}"))
    except SystemExit as end:
        return int(end.code or 0)

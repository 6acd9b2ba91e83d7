"""argv to a configuration, and errors to exit codes. Nothing heavy is imported here.

Exit codes: 0 done, 2 the user's mistake (one sentence), 143 stopped by a signal after saving, 1 anything else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import tyro

from .config.encode import LatentArgs
from .config.file import as_flags
from .config.presets import PRESETS
from .config.sample import SampleArgs
from .config.sections import Config
from .launch.signals import EXIT_CODE, Interrupted, Signals

DEFAULT_PRESET = "digits"
OURS = ("ditmoe", "samplers", "eval")  # beside each other, in a checkout or in site-packages


def parse_train(argv: Sequence[str]) -> Config:
    """`[PRESET | RUN/config.json] [--section.field value ...]` -> Config.

    Mistakes end the program with exit code 2 and a sentence; `--help` ends it with 0.
    """
    named = bool(argv) and not argv[0].startswith("-")
    start, rest = (argv[0], argv[1:]) if named else (DEFAULT_PRESET, argv)
    base = PRESETS[start] if start in PRESETS else _load(start)
    presets = ", ".join(PRESETS)
    return tyro.cli(
        Config,
        prog=f"train.py {start}",
        description=f"Train a diffusion transformer with experts: train.py [PRESET | RUN/config.json] [options]. "
        f"Presets: {presets}. Defaults below are those of {start}.",
        default=base,
        args=list(rest),
    )


def parse_sample(argv: Sequence[str]) -> SampleArgs:
    """`MODEL [options]` -> SampleArgs; mistakes end the program with exit code 2."""
    return tyro.cli(SampleArgs, prog="sample.py", args=list(argv))


def parse_latents(argv: Sequence[str]) -> LatentArgs:
    """`DATA --vae PATH --out DIR [options]` -> LatentArgs; mistakes end the program with exit code 2."""
    return tyro.cli(LatentArgs, prog="python -m ditmoe.latents", args=list(argv))


def run(main: Callable[[], None]) -> int:
    """Call `main` and turn what it raises into an exit code; a user's mistake is one sentence on stderr.

    A signal raises Interrupted in it, wherever it is, but where training has to save first.
    """
    try:
        with Signals(raising=True):
            main()
    except ValueError as error:
        if not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return EXIT_CODE
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _is_ours(error: ValueError) -> bool:
    """Whether our own code raised it, and so meant it for the user; a library's ValueError is a bug of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    root, file = Path(__file__).parents[1], Path(trace.tb_frame.f_code.co_filename)
    ours = root in file.parents and file.relative_to(root).parts[0] in OURS
    return ours or (root in file.parents and "site-packages" not in file.parts)


def _load(start: str) -> Config:
    path = Path(start)
    if path.suffix == ".json" or path.exists():
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            _stop(f"{path} is not a configuration that can be read: {error}")
        if not isinstance(values, dict):
            _stop(f"{path} does not hold a configuration")
        config = tyro.cli(Config, prog=str(path), args=list(as_flags(values)))
        return replace(config, out=path.parent, dry_run=False)
    near = get_close_matches(start, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    _stop(f"there is no preset or file {start!r}; {hint}presets are {', '.join(PRESETS)}")


def _stop(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)

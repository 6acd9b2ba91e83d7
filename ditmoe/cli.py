"""argv to a configuration, and errors to exit codes. Nothing heavy is imported here.

Exit codes: 0 done, 2 the user's mistake (one sentence), 143 stopped by a signal after saving, 1 anything else.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro

from .config import PRESETS, Config
from .config.checks import near as near
from .config.contrast import ContrastArgs as ContrastArgs
from .config.convert import ConvertArgs as ConvertArgs
from .config.convert import ExportArgs as ExportArgs
from .config.encode import LatentArgs as LatentArgs
from .config.file import as_flags, read_file
from .config.play import PlayArgs as PlayArgs
from .config.rules import NUMBERS, RULES, changes
from .config.sample import AnalyzeArgs as AnalyzeArgs
from .config.sample import CentroidsArgs as CentroidsArgs
from .config.sample import ExposureArgs as ExposureArgs
from .config.sample import SampleArgs as SampleArgs
from .files import read_object
from .launch.signals import EXIT_CODE, Interrupted, Signals

Args = TypeVar("Args")

TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0", "")  # which flags do without
_RATE, _PRECISION = "--train.learning-rate", "--train.precision bf16 or fp32"
_SIZE = "--model.sample-size, for latents theirs"
_PRESET = "--moe.preset"
MEANT = {  # what other programs call options of training
    "--lr": _RATE, "--train.lr": _RATE, "--epochs": "--max-steps, in batches", "--iters": "--max-steps",
    "--output": "--out", "--output-dir": "--out", "--resolution": _SIZE, "--image-size": _SIZE,
    "--bf16": _PRECISION, "--fp16": _PRECISION, "--mixed-precision": _PRECISION,
    "--resume": "nothing: the same command goes on with what is in --out", "--ckpt": "--train.init MODEL",
}  # fmt: skip
OURS = ("ditmoe", "samplers", "eval")  # beside each other, in a checkout or in site-packages


def parse(kind: type[Args], argv: Sequence[str], prog: str = "ditmoe") -> Args:
    """What a command is asked, a dataclass of `ditmoe.config`; `prog` is what messages call the command.

    Mistakes end the program with exit code 2 and a sentence; `--help` ends it with 0.
    """
    return tyro.cli(kind, prog=prog, args=_words(kind, argv))


def parse_train(argv: Sequence[str], prog: str = "train.py") -> Config:
    """`[PRESET | RUN/config.json] [--section.field value ...]` -> Config; ends as `parse` does."""
    argv = _words(Config, argv)
    named = bool(argv) and not argv[0].startswith("-")
    flags = _options(Config)
    late = next((word for before, word in pairwise(argv) if before in flags and word in PRESETS), None)
    if late is not None:
        stop(f"the preset comes first: {prog} {late} {' '.join(word for word in argv if word != late)}")
    start, rest = (argv[0], argv[1:]) if named else ("digits", argv)
    base = PRESETS[start] if start in PRESETS else _load(start)
    base, rest = _ruled(base, list(rest))
    description = (
        f"Train a diffusion transformer with experts: {prog} [PRESET | RUN/config.json] [--moe.preset RULE] [options]. "
        f"Presets: {', '.join(PRESETS)}. Rules of routing: {', '.join(RULES)}. Defaults below are those of {start}."
    )
    return tyro.cli(Config, prog=f"{prog} {start}", description=description, default=base, args=list(rest))


def _words(kind: type[Any], argv: Sequence[str]) -> list[str]:
    """The words that were typed; ends as `parse` where one is empty, gives a flag of `kind` a value, asks for a device,
    which is no option, or is another program's word for one of training."""
    flags = _options(kind)
    for at, word in enumerate(argv):
        option, given, _ = word.partition("=")
        name = flags.get(option.replace("_", "-"))
        follows = argv[at + 1].lower() if at + 1 < len(argv) else None
        if name and (given or follows in TRUTHS):
            stop(f"{name} is a flag: write {' or '.join(_spelled(name))}, without a value")
        if not word or (word.startswith("--") and word.endswith("=")):
            what = word or (argv[at - 1] if at else "the first word")
            stop(f"{what.rstrip('=')} is empty; give a value, or leave it out")
        if option in ("--device", "--gpu", "--cuda"):
            what = "the accelerator that torch finds is used, else the CPU, and a run says which"
            stop(f"there is no {word}: {what}; CUDA_VISIBLE_DEVICES=1 before the command chooses another one")
        if kind is Config and (meant := MEANT.get(option.replace("_", "-"))):
            stop(f"there is no {option}; here it is {meant}")
        other = kind is Config and option.startswith("-") and option != _PRESET
        if other and get_close_matches(option, [_PRESET, "--preset"], cutoff=0.9):
            stop(f"there is no {option}; routing rules by name are {_PRESET} RULE")  # no field, so tyro knows it not
    return list(argv)


def _flags(kind: type[Any], prefix: str = "") -> Iterator[str]:
    """The options of a command that are there or not, as `section.field-name`."""
    for field, hint in get_type_hints(kind).items():
        name = prefix + field.replace("_", "-")
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _flags(hint, f"{name}.")
        elif hint is bool:
            yield name


def _options(kind: type[Any]) -> dict[str, str]:
    """The flags of a command, as they may be typed."""
    return {option: name for name in _flags(kind) for option in _spelled(name)}


def _spelled(flag: str) -> tuple[str, str]:
    """How a flag is switched on and off."""
    section, dot, name = flag.rpartition(".")
    return f"--{flag}", f"--{section}{dot}no-{name}"


def _ruled(base: Config, argv: list[str]) -> tuple[Config, list[str]]:
    """The configuration with the rule that `--moe.preset NAME` asks for, if it does, and the other options.

    The rule goes by the numbers of experts that they ask for, and what it makes of one stays. Where it cannot go with
    the rest, its options are the first of all, and those that follow may mend it.
    """
    at = next((i for i, word in enumerate(argv) if word == _PRESET or word.startswith(f"{_PRESET}=")), None)
    if at is None:
        return base, argv
    word, _, name = argv[at].partition("=")
    rest = argv[:at] + argv[at + 1 :] if name else argv[:at] + argv[at + 2 :]
    name = name or "".join(argv[at + 1 : at + 2])
    if name not in RULES:
        stop(f"{word} is {name!r}; {near(name, RULES)}it must be one of {', '.join(RULES)}")
    asked: dict[str, int] = {}
    for key in NUMBERS:
        flag = rf"--moe\.{key.replace('_', '[-_]')}"
        for at in reversed([i for i, word in enumerate(rest) if re.fullmatch(rf"{flag}(=\d+)?", word)]):
            own = rest[at].split("=")[1:] or rest[at + 1 : at + 2]
            if own and own[0].isdecimal():
                asked.setdefault(key, int(own[0]))  # the last counts
                if key in RULES[name](2, 1, 1):  # which the rule makes another of
                    del rest[at : at + (1 if "=" in rest[at] else 2)]
    changed = changes(base, name, **asked)
    try:
        return replace(base, moe=replace(base.moe, **changed)), rest
    except ValueError:
        return base, [*as_flags({"moe": changed}), *rest]


def run(main: Callable[[], int | None]) -> int:
    """Call `main` and turn what it raises into an exit code; a user's mistake is one sentence on stderr.

    A signal raises Interrupted in it, wherever it is, but where training has to save first.
    """
    try:
        with Signals(raising=True):
            return main() or 0
    except ValueError as error:
        if not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return EXIT_CODE
    except PermissionError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename} cannot be read or written: you may not; give another place", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _is_ours(error: ValueError) -> bool:
    """Whether our own code raised it, and so meant it for the user; a library's ValueError is a bug of ours."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    root, file = Path(__file__).parents[1], Path(frame.f_code.co_filename)
    return root in file.parents and (file.relative_to(root).parts[0] in OURS or "site-packages" not in file.parts)


def _load(start: str) -> Config:
    path = Path(start)
    if path.suffix.lower() == ".json" or path.exists():
        if (path / "training.json").is_file() and not (path / "config.json").exists():
            stop(f"{start} is an exported model; {path / 'training.json'} is how it was trained: give that, and --out")
        path = path / "config.json" if path.is_dir() else path
        try:
            return replace(read_file(path), out=path.parent, dry_run=False)
        except ValueError as error:
            try:  # names and values are refused in the words that flags have, with their hints
                words, flags = [*as_flags(read_object(path))], _options(Config)
                if all(word not in flags or after.startswith("--") for word, after in pairwise([*words, "--"])):
                    tyro.cli(Config, prog=str(path), args=words)
            except (ValueError, SystemExit) as end:
                if isinstance(end, SystemExit) and end.code:
                    raise
            stop(str(error))
    stop(f"there is no preset or file {start!r}; {near(start, PRESETS)}presets are {', '.join(PRESETS)}")


def stop(sentence: str) -> NoReturn:
    """End the program: the user's mistake."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)

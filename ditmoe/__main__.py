"""The command `ditmoe`, or `python -m ditmoe`: the one place of ditmoe that knows eval.

A command is a function of its words and of what messages call it. Nothing heavy is imported before the words are read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cli


def train(argv: Sequence[str], prog: str) -> None:
    """Train, or go on; then sample, score and write the run's page."""
    config = cli.parse_train(argv, prog)
    from eval import fid, judge

    from .analysis.plan import describe
    from .data.open import reference
    from .launch.start import is_first, shutdown
    from .report import progress, write
    from .training.loop import open_images
    from .training.loop import train as begin

    if config.dry_run:
        return print(describe(config))
    typed = ["python", *sys.argv] if prog == "train.py" else [*prog.split(), *argv]
    try:
        images = open_images(config)
        score = None if images.is_latent else lambda x: fid.score(x, reference(images, config.seed))
        news = begin(config, images, lambda n, pipe: progress.progress(config, n, pipe, score), typed)
        if is_first():
            write.finish(config, score, judge.judge, news=news)
    finally:
        shutdown()


def sample(argv: Sequence[str], prog: str) -> None:
    """Draw images from a trained model: a grid, a folder, an .npz; score them."""
    args = cli.parse(cli.SampleArgs, argv, prog)
    from eval import fid, processes

    from .generate import request

    group: Any
    with processes.joined() as group:
        score = fid.scorer(args.score, args.report, group, **args.score_options()) if args.score else None
        request.run(args, group, score)


def score(argv: Sequence[str], prog: str) -> int:
    """Score images against a reference: Fréchet distance, KID, precision and recall, ..."""
    from eval import fid

    return fid.main(argv, prog)


def encode(argv: Sequence[str], prog: str) -> None:
    """Encode images with a VAE, once, to train on their latents."""
    args = cli.parse(cli.LatentArgs, argv, prog)
    from .data import encode
    from .launch import start

    try:
        encode.encode(args, start.joined())
    finally:
        start.shutdown()


def export(argv: Sequence[str], prog: str) -> None:
    """Write the model of a run as a folder to give away."""
    args = cli.parse(cli.ExportArgs, argv, prog)
    from .convert import export

    export.export(args)


def convert(argv: Sequence[str], prog: str) -> None:
    """Make a model folder of a checkpoint of DiT, SiT, DiT-MoE or diffusers, or take one out."""
    args = cli.parse(cli.ConvertArgs, argv, prog)
    from .convert import convert

    convert.run(args)


def exposure(argv: Sequence[str], prog: str) -> None:
    """Measure how far a sampler strays from what the network was trained on."""
    args = cli.parse(cli.ExposureArgs, argv, prog)
    from .analysis import exposure

    exposure.run(args)


def analyze(argv: Sequence[str], prog: str) -> None:
    """Say which experts serve what, how evenly, and at which noise; contrast: which serve a more than b."""
    if argv[:1] == ["contrast"]:
        asked = cli.parse(cli.ContrastArgs, argv[1:], f"{prog} contrast")
        from .report import contrast

        return contrast.run(asked)
    args = cli.parse(cli.AnalyzeArgs, argv, prog)
    from .report import analyze

    analyze.run(args)


def centroids(argv: Sequence[str], prog: str) -> None:
    """Fit the centres of centroid routers to a trained model's tokens."""
    args = cli.parse(cli.CentroidsArgs, argv, prog)
    from .convert import centroids

    centroids.run(args)


def play(argv: Sequence[str], prog: str) -> None:
    """Serve a page to draw from a model: compare settings, suppress or force experts."""
    args = cli.parse(cli.PlayArgs, argv, prog)
    from .play import serve

    serve.run(args)


COMMANDS = {
    command.__name__: command
    for command in (train, sample, score, encode, export, convert, exposure, analyze, centroids, play)
}


def main() -> int:
    """The exit code of the command that was typed."""
    program = "python -m ditmoe" if Path(sys.argv[0]).name == "__main__.py" else "ditmoe"
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items())
        print(f"usage: {program} COMMAND ...\n\n{lines}\n\n{program} COMMAND --help has the options of one.")
        return 0
    if name not in COMMANDS:
        cli.stop(f"there is no command {name!r}; {cli.near(name, COMMANDS)}commands are {', '.join(COMMANDS)}")
    return cli.run(lambda: COMMANDS[name](words, f"{program} {name}"))


if __name__ == "__main__":
    sys.exit(main())

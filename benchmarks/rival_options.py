"""What the contest of rivals is asked."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rival_training import NAMES

TUNE_SEED = 17


def parsed(about: str | None = None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for, and its folder made."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, each")
    parser.add_argument("--tune-minutes", type=float, help="of training for each learning rate; default: a fifth")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--ours", type=Path, help="a finished run of the preset, instead of training ours here")
    parser.add_argument("--rates", type=float, nargs="+", help="of all, or of --only; default: FACTORS, RATES")
    parser.add_argument("--rival-objective", choices=["flow-logit-normal", "flow-uniform", "preset"],
                        default="flow-logit-normal")  # fmt: skip
    parser.add_argument("--beta2", type=float, help="of the rivals' AdamW; default: the preset's")
    parser.add_argument("--batch-size", type=int, help="of the rivals; default: the preset's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="where it is faster")
    parser.add_argument("--rounds", type=int, default=9, help="of timing, four steps each")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0], help="scales to choose from")
    parser.add_argument("--sampler", help="default: the preset's")
    parser.add_argument("--calls", type=int, help="sampling steps; default: the preset's")
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--extractors", nargs="+", default=["random-conv-v1", "efficientnet-lite0"])
    parser.add_argument("--tune-extractor", default="random-conv-v1")
    parser.add_argument("--tune-num", type=int, default=2000)
    parser.add_argument("--num-ref", type=int, help="training images of the reference; default: all")
    parser.add_argument("--score-only", action="store_true", help="train nothing, score the weights that are there")
    parser.add_argument("--cache", type=Path, default=Path("runs/scoring"))
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    args = parser.parse_args(argv)
    assert TUNE_SEED not in args.seeds, f"seed {TUNE_SEED} chooses the settings and cannot be reported"
    args.out.mkdir(parents=True, exist_ok=True)
    return args

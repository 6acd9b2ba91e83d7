"""Draw images from a trained model: `python sample.py MODEL [--num N | --classes 3 7 7] [--out OUT] [--score REF]`."""

import sys

from ditmoe import cli


def main() -> None:
    """Parse, sample, write, score; under torchrun or accelerate launch the processes share the work."""
    args = cli.parse_sample(sys.argv[1:])
    from ditmoe.generate import request as image_sets
    from eval import fid, processes

    group = processes.join()
    try:
        score = fid.scorer(args.score, args.report, group, **args.score_options()) if args.score else None
        image_sets.run(args, group, score)
    finally:
        processes.leave(group)


if __name__ == "__main__":
    sys.exit(cli.run(main))

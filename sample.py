"""Draw images from a trained model: `python sample.py MODEL [--num N | --classes 3 7 7] [--out OUT] [--score REF]`."""

import sys

from ditmoe import cli


def main() -> None:
    """Parse, sample, write, score; under torchrun or accelerate launch the processes share the work."""
    args = cli.parse_sample(sys.argv[1:])
    from ditmoe import image_sets
    from eval import fid, processes
    from eval.images import Images

    group = processes.join()

    def score(drawn: object) -> None:
        images = Images(**drawn) if isinstance(drawn, dict) else drawn
        fid.score_and_show(images, args.score, args.report, group, **args.score_options())

    try:
        image_sets.run(args, group, score if args.score else None)
    finally:
        processes.leave(group)


if __name__ == "__main__":
    sys.exit(cli.run(main))

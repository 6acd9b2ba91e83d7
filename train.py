"""Train, sample, score, report: `python train.py [PRESET | RUN/config.json] [--section.field value ...]`."""

import sys

from ditmoe import __main__, cli


def main() -> None:
    """The command `ditmoe train`."""
    __main__.train(sys.argv[1:], "train.py")


if __name__ == "__main__":
    sys.exit(cli.run(main))

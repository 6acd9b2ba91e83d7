"""Draw images from a trained model: `python sample.py MODEL [--num N | --classes 3 7 7] [--out OUT]`."""

import sys

from ditmoe import cli


def main() -> None:
    """Parse, sample, write."""
    args = cli.parse_sample(sys.argv[1:])
    from ditmoe import generate

    generate.run(args)


if __name__ == "__main__":
    sys.exit(cli.run(main))

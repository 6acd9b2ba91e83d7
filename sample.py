"""Draw images from a trained model: `python sample.py MODEL [--num N | --classes 3 7 7] [--out OUT] [--score REF]`."""

import sys

from ditmoe import __main__, cli


def main() -> None:
    """The command `ditmoe sample`."""
    __main__.sample(sys.argv[1:], "sample.py")


if __name__ == "__main__":
    sys.exit(cli.run(main))

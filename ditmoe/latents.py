"""Encode images once, train on their latents: `python -m ditmoe.latents DATA --vae PATH --out DIR`.

Nothing heavy is imported before the command line has been read.
"""

from __future__ import annotations

import sys

from . import cli


def main() -> None:
    """Parse and encode; under torchrun or accelerate launch the processes share the work."""
    args = cli.parse_latents(sys.argv[1:])
    from .data import encode
    from .launch import start

    try:
        encode.encode(args, start.joined())
    finally:
        start.shutdown()


if __name__ == "__main__":
    sys.exit(cli.run(main))

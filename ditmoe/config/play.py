"""What the command play is asked. No torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class PlayArgs:
    """Serve a page that draws from a trained model: see images arise, compare settings, suppress or force experts."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a pipeline folder such as models/fashion."""
    host: str = "127.0.0.1"
    """Address or name of this machine to serve at, and be asked by; default: this machine alone. 0.0.0.0 lets everybody
    in who can reach it, by any name."""
    port: int = 7860
    """Port to serve at; 0 takes one that is free."""

    def __post_init__(self) -> None:
        if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
            raise ValueError(f"play needs {' and '.join(missing)}; install what it needs: pip install 'ditmoe[play]'")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be in 0..65535")

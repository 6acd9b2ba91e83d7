"""What the command analyze contrast is asked. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .checks import at_least, require, writable
from .policy import Action, Rule
from .sample import AnalyzeArgs


@dataclass(frozen=True, kw_only=True)
class ContrastArgs(AnalyzeArgs):
    """Which experts serve the images of one group, a, more than those of another, b.

    Held-out images of the model's own data set (training images where it has none) are noised to every time step and
    pass through the network once. Prints the experts that differ most; writes contrast.json and contrast.png.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """A run folder, or a pipeline folder such as models/digits."""
    a: tuple[str, ...]
    """The group: class=LABEL, class=NAME, or of a mixture of data sets domain=SET; several are one group."""
    b: tuple[str, ...]
    """What it is compared with, likewise."""
    num: int = 200
    """Images of each group, as many of every class; fewer where a class has fewer."""
    top: int = 4
    """How many experts to show, and to put into the policy: those that serve a more than b."""
    policy: Path | None = None
    """Write a policy for these experts, FILE.json, for sample.py --policy."""
    action: Action = "suppress"
    """What the policy does with them."""
    bias: float | None = None
    """Of favour: what is added to their logits."""
    out: Path = Path("contrast")
    """Folder of contrast.json and contrast.png, made if it is not there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.models) == 1, f"analyze contrast takes one model, and got {len(self.models)}")
        at_least(self, 1, "top")
        for name, words in (("a", self.a), ("b", self.b)):
            for word in words or ("",):
                kind, _, which = word.partition("=")
                known = kind in ("class", "domain") and which != ""
                require(known, f"{name} has {word!r}; give class=LABEL, class=NAME or domain=SET")
        Rule(0, 0, self.action, self.bias)
        if self.policy is None:
            idle = self.action == "suppress" and self.bias is None
            require(idle, "action and bias are of a policy; give --policy FILE.json too")
        elif self.policy.suffix.lower() != ".json" or not self.policy.absolute().parent.is_dir():
            raise ValueError(f"policy {self.policy} must be a .json file in a folder that exists")
        else:
            writable("policy", self.policy)

"""How few hidden units of a dense layer a token uses: what has to be small before the layer is cut into experts.

Shapes: N images, T tokens of an image, H hidden units.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..model import DiTMoETransformer2DModel


@contextmanager
def hidden_units(net: DiTMoETransformer2DModel | None) -> Iterator[list[Tensor]]:
    """The hidden units (N, T, H) of the dense layer of every block without experts, of the pass while this is open.

    Nothing of None.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0])

    with ExitStack() as stack:
        for block in () if net is None else net.blocks:
            if hasattr(block, "mlp"):
                layer: Any = block.mlp
                stack.callback(layer.fc2.register_forward_pre_hook(keep).remove)
        yield found


def square_hoyer(hidden: Tensor) -> Tensor:
    """mean over tokens of |a|_1^2 / (H |a|_2^2), a float32 scalar in [1 / H, 1]: about the share of units in use.

    Source: Hoyer regularisation as in D2DMoE (arXiv 2310.04361), divided by H, so that a weight means the same at every
    width. There the units are ReLU's, which can be 0; ours (swiglu, gelu) come near it.
    """
    a = hidden.float()
    share: Tensor = a.abs().sum(dim=-1).square() / a.square().sum(dim=-1).clamp_min(1e-12)
    return share.mean() / hidden.shape[-1]

"""A network whose experts stay on the disk."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate import init_empty_weights
from torch import Tensor

from ..model import DiTMoETransformer2DModel
from ..moe import Experts
from .experts import StoredExperts
from .slices import Slices

PARTS = ("w_in", "w_out", "w_in_scale", "w_out_scale")


def stored_network(folder: Path, cached: int) -> DiTMoETransformer2DModel:
    """The network of a pipeline's `transformer/` folder, float32 but for `cached` experts a layer, as stored.

    Raises:
        ValueError: It has no stacked experts, or fewer than 1 is to have room.
    """
    with init_empty_weights(include_buffers=False):
        net: DiTMoETransformer2DModel = DiTMoETransformer2DModel.from_config(
            DiTMoETransformer2DModel.load_config(folder)
        )
    slices, reader = Slices(folder), ThreadPoolExecutor(1)
    stored = [name for name, module in net.named_modules() if isinstance(module, Experts)]
    if not stored:
        raise ValueError("cached_experts is for models with stacked experts, and this one has none; leave it out")
    if cached < 1:
        raise ValueError(f"cached_experts is {cached}; it must be 1 or more")
    for name in stored:
        names = [key for part in PARTS if (key := f"{name}.{part}") in slices.places]

        def read(e: int, out: tuple[Tensor, ...], names: list[str] = names) -> None:
            for each, into in zip(names, out, strict=True):
                slices.read(each, e, into)

        places = [slices.places[each] for each in names]
        net.set_submodule(name, StoredExperts(net.get_submodule(name), read, places, cached, reader))
    rest = [name for name in slices.places if name.rpartition(".")[0] not in stored]
    net.load_state_dict({name: slices.tensor(name).float() for name in rest}, assign=True)
    net.eval().requires_grad_(False)
    return net

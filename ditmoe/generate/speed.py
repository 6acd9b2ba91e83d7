"""How fast a set is drawn: precision, compilation, a cache between steps, and how many images at once.

Shapes: T tokens of an image, D width.
"""

from typing import Any

import torch
from diffusers.hooks import TaylorSeerCacheConfig
from torch import nn

from ..config.sample import SampleArgs
from ..launch.start import resolve_precision
from ..model import DiTMoETransformer2DModel, to_compile, tokens_per_image
from ..moe import Router
from ..pipeline import DiTMoEPipeline

ALWAYS_RUN = 3  # first steps, in which a cache leaves nothing out
CPU_TOKENS = 3136  # of a batch on a CPU; see `batch_size`
VALUES = 64  # of width D that a forward pass holds at once for a token, at most
PIXEL_BYTES = 4096  # of a picture that a VAE decodes, in float32


def prepare(pipe: DiTMoEPipeline, guide: nn.Module | None, args: SampleArgs) -> dict[str, Any]:
    """Make the networks of a pipeline run as a command line asks; the facts of it, beside the dtype where it is so.

    In bfloat16 are the weights of all but the routers. A compiled network wants batches of one size.
    """
    precision = resolve_precision(args.precision, pipe.device)
    networks = [net for net in (pipe.transformer, guide) if isinstance(net, DiTMoETransformer2DModel)]
    for net in networks:
        if precision == "bf16":
            _halve(net)
        for part in map(to_compile, net.blocks if args.compile else ()):
            part.forward = torch.compile(part.forward, dynamic=False)
        if args.cache is not None:
            *others, last = (f"blocks\\.{i}" for i in range(len(net.blocks)))  # what the last gives is all of them
            how = {"cache_identifiers": [last], "skip_predict_identifiers": others}
            every = int(args.cache.partition(":")[2])
            net.enable_cache(TaylorSeerCacheConfig(every, ALWAYS_RUN, taylor_factors_dtype=torch.float32, **how))
    found: dict[str, Any] = {"dtype": "bfloat16" if precision == "bf16" else "float32"}
    found |= {"compiled": True} if args.compile else {}
    return found | ({} if args.cache is None else {"cache": args.cache})


def blocks_run(cache: str, steps: int) -> int:
    """In how many of so many steps the blocks are run under a cache taylor:N, which foretells the others."""
    return min(steps, ALWAYS_RUN) + max(0, steps - ALWAYS_RUN) // int(cache.partition(":")[2])


def _halve(net: nn.Module) -> None:
    """Weights and tables in bfloat16, but those of routers, which decide in float32, and int8 ones and their scales."""
    kept = {part for module in net.modules() if isinstance(module, Router) for part in module.modules()}
    for module in set(net.modules()) - kept:
        for name, part in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if part.is_floating_point() and not name.endswith("_scale"):
                part.data = part.data.to(torch.bfloat16)


def batch_size(pipe: DiTMoEPipeline) -> int:
    """Images to draw at once where nobody says, the same on every machine with such a device.

    A CPU is as fast with few images as with many: about `CPU_TOKENS` tokens, and so on MPS. With CUDA and XPU what fits
    into a third of the device's memory with guidance, at most 1,024, as a power of two.
    """
    net = pipe.transformer
    tokens = tokens_per_image(net)
    if pipe.device.type not in ("cuda", "xpu"):
        return max(1, min(64, CPU_TOKENS // tokens))
    memory = torch.get_device_module(pipe.device).get_device_properties(pipe.device).total_memory // 3
    one = 2 * tokens * net.config.hidden_size * VALUES * net.dtype.itemsize
    if pipe.vae is not None:
        one = max(one, pipe.image_shape[1] * pipe.image_shape[2] * PIXEL_BYTES)
    return int(2 ** min(10, max(0, (memory // one).bit_length() - 1)))

"""LoRA (Hu et al. 2021, arXiv 2106.09685) by PEFT: small trained differences of attention and of stacked experts.

Routers are left out: what experts have learnt is for the tokens that these routers send.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..model import DiTMoETransformer2DModel
from ..moe import Experts

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
_ATTENTION = r".*\.attn\.(qkv|proj)"
_EXPERTS = ["experts.w_in", "experts.w_out"]  # (E, out, in): PEFT reads three axes so
_MOST = 2**20  # characters of an adapter's settings


def adapt(
    net: DiTMoETransformer2DModel, rank: int = 8, alpha: float | None = None, *, experts: bool = True,
    name: str = "default",
) -> None:  # fmt: skip
    """Add alpha / rank B A, which starts at 0, to every matrix of attention and with `experts` of each stacked expert.

    A and B alone are trained from then on. `alpha`: default: `rank`. `net.save_lora_adapter(FOLDER)` writes them.

    Raises:
        ValueError: The rank is below 1, the model stores experts as int8, or PEFT is not installed.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more")
    if net.config.expert_storage == "int8":
        raise ValueError("experts stored as int8 take no LoRA; use the model that it was made of")
    stacked = experts and any(isinstance(module, Experts) for module in net.modules())
    net.add_adapter(_config(rank, rank if alpha is None else alpha, stacked), name)


def load(net: DiTMoETransformer2DModel, folder: Path, *, name: str = "default") -> None:
    """Add a saved adapter. (`load_lora_adapter` of diffusers knows no stacked experts.)

    Raises:
        ValueError: The folder holds none, not one for this model, or one with settings that `adapt` does not make.
    """
    peft, file = _peft(), folder / FILE
    try:
        with safe_open(file, framework="pt") as opened:
            found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            says = json.loads((opened.metadata() or {})["lora_adapter_metadata"][:_MOST])
        alpha = float(says["lora_alpha"])
        rank = next(v.shape[0] for key, v in found.items() if key.endswith("attn.qkv.lora_A.weight"))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{file} is not an adapter that can be read: {error!s:.200}") from error
    except StopIteration as error:
        raise ValueError(f"{file} is an adapter of another model: it has no attn.qkv") from error
    if not math.isfinite(alpha) or not all(value.isfinite().all() for value in found.values()):
        raise ValueError(f"{file} has values that are not finite")
    experts = any(".experts." in key for key in found)
    ours = json.loads(json.dumps(_config(rank, alpha, experts).to_dict(), default=sorted))
    ours |= {entry: says.get(entry) for entry in ("peft_version", "revision", "base_model_name_or_path")}
    if other := sorted(entry for entry in says if says[entry] != ours.get(entry)):
        raise ValueError(f"{file} has {other[0]} {says[other[0]]!r:.100}, which ditmoe's adapters do not have")
    adapt(net, rank, alpha, experts=experts, name=name)
    wanted = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(net, adapter_name=name).items()}
    if wanted != {key: tuple(value.shape) for key, value in found.items()}:
        net.delete_adapters(name)
        raise ValueError(f"{file} is an adapter of another model: its matrices do not fit this one")
    peft.set_peft_model_state_dict(net, found, adapter_name=name)


def merge(net: DiTMoETransformer2DModel) -> None:
    """Add the adapters to the weights, and leave a network as it was before there were any."""
    net.fuse_lora()
    net.unload_lora()


def _config(rank: int, alpha: float, experts: bool) -> Any:
    targets = _EXPERTS if experts else None
    return _peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=_ATTENTION, target_parameters=targets)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs PEFT: pip install 'ditmoe[lora]'") from error
    return peft

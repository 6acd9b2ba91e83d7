"""Do experts in attention (SwitchHead) pay in time? Forward and backward of one attention, dense and with experts.

Six dense heads of 64 channels at width 384, against two heads with 4 maps to values and outputs each, 2 of them used,
as wide as gives about as many parameters: a third of the attention matrices. At 1,024 tokens it is to take at most
0.9 of the dense one's time.

    python -m benchmarks.attention [--rounds 9] [--images 2] [--precision bf16]
"""

import argparse
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.moe_layer import DEVICE, WIDTH, backward_of
from benchmarks.timing import machine, round_robin
from ditmoe.model.layers import Attention
from ditmoe.moe import AttentionExperts

HEADS, FEWER, MAPS, USED = 6, 2, 4, 2
MOST = 0.9
TOKENS = (256, 1024, 4096)


def dense() -> Attention:
    return Attention(WIDTH, HEADS, "rms").to(DEVICE)


def routed() -> Attention:
    """Channels d of each of H heads, 4 D^2 = (2 + 2 E) D H d parameters, rounded to what grouped_mm can have."""
    d = round(4 * WIDTH / ((2 + 2 * MAPS) * FEWER) / 8) * 8
    maps = AttentionExperts(WIDTH, FEWER, d, MAPS, USED)
    return Attention(WIDTH, FEWER, "rms", maps, d).to(DEVICE)


def passed(module: nn.Module, half: bool, x: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16) if half else nullcontext():
        y: Tensor = module(x, None)
        return y.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    modules = {"dense": dense(), "experts": routed()}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    said = ", ".join(f"{name} {size:,} parameters" for name, size in sizes.items())
    print(f"{machine()}; {args.images} images, {args.precision}, forward + backward; {said}\n")
    print("| tokens | dense, ms | experts, ms | of it |\n|---|---|---|---|")
    for tokens in TOKENS:
        rivals = {
            name: backward_of(partial(passed, m, args.precision == "bf16"), m, tokens, torch.float32, args.images)
            for name, m in modules.items()
        }
        ms = {name: 1e3 * seconds for name, seconds in round_robin(rivals, args.rounds).items()}
        ratio = ms["experts"] / ms["dense"]
        note = f" (wanted: {MOST} at most)" if tokens == 1024 else ""
        print(f"| {tokens} | {ms['dense']:.1f} | {ms['experts']:.1f} | {ratio:.2f}{note} |", flush=True)


if __name__ == "__main__":
    main()

"""How close is the expert layer to a dense feed-forward layer of the same FLOPs? Forward + backward, same run.

Two dense rivals have the FLOPs of the K experts a token visits:
* `bound`: one FeedForward(D, F) over S * K tokens: the same rows and widths without routing, the best that any
  dispatch could reach;
* `twin`: one FeedForward(D, K * F) over S tokens: what the layer replaces in a model.

    python -m benchmarks.moe_layer [--rounds 9] [--tokens 4096]
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import machine, round_robin
from ditmoe.moe import FeedForward, MoELayer, RoutingRule

WIDTH = 384
CASES = [(8, 2, 1536), (16, 2, 1536), (64, 8, 384)]  # E, K, F
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rivals(E: int, K: int, F: int, S: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, num_experts=E, expert_width=F, shared_width=0, rule=RoutingRule(K)).to(DEVICE, dtype)
    narrow = FeedForward(WIDTH, F, "swiglu").to(DEVICE, dtype)
    wide = FeedForward(WIDTH, F * K, "swiglu").to(DEVICE, dtype)
    return {
        "moe": backward_of(lambda x: layer(x)[0], layer, S, dtype),
        "bound": backward_of(narrow, narrow, S * K, dtype),
        "twin": backward_of(wide, wide, S, dtype),
    }


def backward_of(
    forward: Callable[[Tensor], Tensor], module: nn.Module, tokens: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Forward and backward, gradients of the input included; old gradients are dropped first, as in training."""
    x = torch.randn(1, tokens, WIDTH, device=DEVICE, dtype=dtype, requires_grad=True)
    g = torch.randn(1, tokens, WIDTH, device=DEVICE, dtype=dtype)

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        forward(x).backward(g)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    print(f"{machine()}; D {WIDTH}, {args.tokens} tokens, forward + backward, medians of {args.rounds} rounds\n")
    print("| E | K | F | dtype | MoE ms | bound ms | twin ms | bound / MoE | twin / MoE |")
    print("|---|---|---|---|---|---|---|---|---|")
    for E, K, F in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            t = round_robin(rivals(E, K, F, args.tokens, dtype), args.rounds)
            print(
                f"| {E} | {K} | {F} | {str(dtype)[6:]} | {t['moe'] * 1e3:.0f} | {t['bound'] * 1e3:.0f} | "
                f"{t['twin'] * 1e3:.0f} | {t['bound'] / t['moe']:.2f} | {t['twin'] / t['moe']:.2f} |",
                flush=True,
            )
    print("\n| tokens (E 8, K 2, F 1536, bfloat16) | MoE µs per token |\n|---|---|")
    sizes = [1024, 2048, 4096, 8192, 16384]
    scaling = {str(S): rivals(8, 2, 1536, S, torch.bfloat16)["moe"] for S in sizes}
    times = round_robin(scaling, args.rounds)
    for S in sizes:
        print(f"| {S} | {times[str(S)] / S * 1e6:.1f} |")


if __name__ == "__main__":
    main()

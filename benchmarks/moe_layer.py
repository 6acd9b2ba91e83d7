"""How close is the expert layer to a dense feed-forward layer of the same FLOPs? Forward + backward, same run.

Two dense rivals have the FLOPs of the K experts a token visits:
* `bound`: one FeedForward(D, F) over S * K tokens: the same rows and widths without routing, the best that any
  dispatch could reach;
* `twin`: one FeedForward(D, K * F) over S tokens: what the layer replaces in a model.

    python -m benchmarks.moe_layer [--rounds 9] [--tokens 4096]
    python -m benchmarks.moe_layer --rules          # ways to choose, against the twin: 16 images of 256 tokens
    python -m benchmarks.moe_layer --backends       # which backend is the faster, and which --moe.backend auto takes
    python -m benchmarks.moe_layer --backends --drawing --dtypes float32        # the same without gradients
"""

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import machine, round_robin
from ditmoe.moe import Condition, FeedForward, Input, MoELayer, RoutingRule

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


RULES: dict[str, tuple[RoutingRule, tuple[Input, ...]]] = {
    "top-K of a token": (RoutingRule(2, "sigmoid", True, 2.0), ("token",)),
    "expert choice": (RoutingRule(2, "sigmoid", True, 2.0, "expert_choice"), ("token",)),
    "threshold": (RoutingRule(2, "sigmoid", True, 2.0, "threshold"), ("token",)),
    "capacity 1.25, at random": (RoutingRule(2, "sigmoid", True, 2.0, capacity=1.25, overflow="random"), ("token",)),
    "top-K of a time": (RoutingRule(2, "sigmoid", True, 2.0), ("time",)),
    "top-K of a place": (RoutingRule(2, "sigmoid", True, 2.0), ("position",)),
}


def rules(dtype: torch.dtype, images: int = 16, tokens: int = 256, E: int = 8, F: int = 768) -> dict[str, Any]:
    """Forward and backward of a layer a rule, and of the dense layer of equal active width."""
    torch.manual_seed(0)
    embedded = torch.randn(images, WIDTH, device=DEVICE)
    condition = Condition(embedded, embedded, timestep=torch.linspace(1, 999, images, device=DEVICE))
    steps = {}
    for name, (rule, inputs) in RULES.items():
        places = torch.randn(tokens, WIDTH) if "position" in inputs else None
        made = MoELayer(
            WIDTH, num_experts=E, expert_width=F, shared_width=0, rule=rule, inputs=inputs, positions=places
        ).to(DEVICE, dtype)
        steps[name] = backward_of(lambda x, m=made: m(x, condition)[0], made, tokens, dtype, images)  # type: ignore[misc]
    wide = FeedForward(WIDTH, 2 * F, "swiglu").to(DEVICE, dtype)
    return {"dense": backward_of(wide, wide, tokens, dtype, images), **steps}


SIZES = [(128, 128), (WIDTH, 256), (WIDTH, 1536)]  # D, F


def backends(
    D: int, F: int, E: int, S: int, dtype: torch.dtype, drawing: bool
) -> tuple[dict[str, Callable[[], object]], str]:
    """One layer, top-2 of E, by each backend, of the same weights; and the one of `auto`.

    Forward and backward, or forward alone and without gradients where it is `drawing`.
    """
    layer = MoELayer(D, num_experts=E, expert_width=F, shared_width=0, rule=RoutingRule(2, "sigmoid")).to(DEVICE, dtype)
    experts: Any = layer.experts
    with torch.set_grad_enabled(not drawing):
        auto = "grouped" if experts._use_grouped(torch.empty(0, device=DEVICE, dtype=dtype), 2 * S) else "loop"

    def by(backend: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            experts.backend = backend
            y: Tensor = layer(x)[0]
            return y

        return forward

    step = forward_of if drawing else backward_of
    return {name: step(by(name), layer, S, dtype, width=D) for name in ("grouped", "loop")}, auto


def forward_of(
    forward: Callable[[Tensor], Tensor], _: nn.Module, tokens: int, dtype: torch.dtype, width: int
) -> Callable[[], object]:
    """Forward alone, without gradients."""
    x = torch.randn(1, tokens, width, device=DEVICE, dtype=dtype)
    return lambda: torch.no_grad()(forward)(x)


def backward_of(
    forward: Callable[[Tensor], Tensor], module: nn.Module, tokens: int, dtype: torch.dtype, images: int = 1,
    width: int = WIDTH,
) -> Callable[[], object]:  # fmt: skip
    """Forward and backward, gradients of the input included; old gradients are dropped first, as in training."""
    x = torch.randn(images, tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    g = torch.randn(images, tokens, width, device=DEVICE, dtype=dtype)

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        forward(x).backward(g)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rules", action="store_true", help="the ways to choose instead")
    parser.add_argument("--backends", action="store_true", help="the backends instead")
    parser.add_argument("--drawing", action="store_true", help="of the backends forward alone, without gradients")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of the backends")
    args = parser.parse_args()
    if args.drawing and not args.backends:
        parser.error("--drawing is of --backends")
    if args.backends:
        what = "forward without gradients" if args.drawing else "forward + backward"
        print(f"{machine()}; top-2 of E, {what}, medians of {args.rounds} rounds\n")
        print("| D | F | E | tokens | dtype | grouped ms | loop ms | auto takes | of the best |\n|" + "---|" * 9)
        for (D, F), E, S, name in product(SIZES, (8, 16, 64), (256, 1024, 4096), args.dtypes):
            steps, auto = backends(D, F, E, S, getattr(torch, name), args.drawing)
            t = round_robin(steps, args.rounds)
            cells = " | ".join([*(f"{value * 1e3:.1f}" for value in t.values()), auto])
            share = t[auto] / min(t.values())
            print(f"| {D} | {F} | {E} | {S} | {name} | {cells} | {share:.2f} |", flush=True)
        return
    if args.rules:
        print(f"{machine()}; D {WIDTH}, 16 images of 256 tokens, top-2 of 8, F 768, medians of {args.rounds} rounds\n")
        print("| rule | fp32 ms | of the dense layer | bf16 ms | of the dense layer |\n|---|---|---|---|---|")
        both = [round_robin(rules(dtype), args.rounds) for dtype in (torch.float32, torch.bfloat16)]
        for name in both[0]:
            cells = [f"{t[name] * 1e3:.0f} | {t[name] / t['dense']:.2f}" for t in both]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        return
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

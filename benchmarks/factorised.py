"""What do more factorised experts cost? Forward + backward of one layer with 8, 64 and 256 of them, same run.

The factors stay as many; with 256 experts the layer is to take at most 2.5 times what it takes with 8. Beside it a
stacked layer of 8 experts with two a token, of about the same parameters active.

    python -m benchmarks.factorised [--rounds 9] [--tokens 4096] [--rank 256] [--score entmax]
"""

import argparse

import torch

from benchmarks.moe_layer import DEVICE, WIDTH, backward_of
from benchmarks.timing import machine, round_robin
from ditmoe.moe import MoELayer, RoutingRule

HIDDEN = 1024
EXPERTS = (8, 64, 256)
MOST = 2.5  # of the time with 256 experts over that with 8


def layer(E: int, rule: RoutingRule, width: int, rank: int | None = None) -> MoELayer:
    torch.manual_seed(0)
    made = MoELayer(WIDTH, num_experts=E, expert_width=width, shared_width=0, rule=rule, rank=rank)
    return made.to(DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--score", choices=("entmax", "softmax"), default="entmax")
    args = parser.parse_args()
    rule = RoutingRule(1, args.score, kind="dense")
    layers = {f"factorised, {E}": layer(E, rule, HIDDEN, args.rank) for E in EXPERTS}
    layers["stacked, 2 of 8"] = layer(8, RoutingRule(2, renormalize=True, scale=2.0), 432)
    rivals = {
        name: backward_of(lambda x, m=made: m(x)[0], made, args.tokens, torch.float32) for name, made in layers.items()
    }
    seconds = round_robin(rivals, args.rounds)
    print(
        f"{machine()}; D {WIDTH}, {args.tokens} tokens, rank {args.rank}, {args.score}, forward + backward, float32\n"
    )
    print("| experts | parameters | ms | over 8 factorised |\n|---|---|---|---|")
    first = seconds[f"factorised, {EXPERTS[0]}"]
    for name, made in layers.items():
        size = sum(p.numel() for p in made.parameters())
        print(f"| {name} | {size / 1e6:.2f} M | {seconds[name] * 1e3:.0f} | {seconds[name] / first:.2f} |")
    ratio = seconds[f"factorised, {EXPERTS[-1]}"] / first
    print(f"\n{EXPERTS[-1]} over {EXPERTS[0]}: {ratio:.2f}, wanted {MOST} at most: {'yes' if ratio <= MOST else 'no'}")


if __name__ == "__main__":
    main()

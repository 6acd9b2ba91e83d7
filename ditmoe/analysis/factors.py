"""What factorised experts cost: operations, and bytes of activations; for `budget`.

Shapes: T tokens of an image, D width, E experts, F hidden width, C factors of each of the two layers; m is 2 for
swiglu, 1 for gelu; b is 2 bytes in bf16, 4 in fp32. A decision belongs to a token, an image, or all images of a place.
"""

from __future__ import annotations

from ..config.sections import Config


def _sizes(config: Config) -> tuple[int, int, int]:
    """C, F and m F."""
    e, activation = config.moe, config.model.activation
    width = e.expert_width
    return e.factors(config.model.hidden_size, activation), width, width * (2 if activation == "swiglu" else 1)


def operations(config: Config, tokens: float, decisions: float) -> float:
    """Of one image: 2 C (2 D + m F + F) a token, and 4 E C a decision for what weighs the factors of both layers."""
    C, F, inner = _sizes(config)
    return 2 * C * (2 * config.model.hidden_size + inner + F) * tokens + 4 * config.moe.num_experts * C * decisions


def kept(config: Config, b: int, decisions: float) -> float:
    """Bytes that autograd keeps of a token: b (4 C + (1 + m) F), and of a decision 2 b C, in bf16 2 E more."""
    C, F, inner = _sizes(config)
    return b * (4 * C + inner + F) + decisions * (2 * b * C + (2 * config.moe.num_experts if b == 2 else 0))


def widest(config: Config) -> int:
    """Values of a token that pass in a layer at a time: a gradient of its factors, twice, and of the hidden units."""
    C, F, inner = _sizes(config)
    return 2 * C + inner + F

"""What becomes of single experts while a model draws: suppressed, forced or favoured, by step. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from ..files import read_object
from .rule import RoutingRule

Action = Literal["suppress", "force", "favour"]


@dataclass(frozen=True)
class Rule:
    """What becomes of one expert, `expert` of the block `layer`, both from 0.

    suppress: it serves nobody. force: it serves every token (among the K of topk, beside its own tokens of others), by
    the weight of the token's best. favour: `bias` is added to its logit. `steps` (first, last) are sampling steps from
    0, both included, as callback_on_step_end counts them; None: all.
    """

    layer: int
    expert: int
    action: Action
    bias: float | None = None
    steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        steps, bias = self.steps, self.bias
        for name in ("layer", "expert"):
            value = getattr(self, name)
            _refuse(type(value) is not int or value < 0, f"{name} is {value!r}; it must be a whole number, 0 or more")
        _refuse(self.action not in get_args(Action), f"action is {self.action!r}; it is suppress, force or favour")
        number = isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= 1000
        favours = self.action == "favour"
        _refuse(favours and not number, f"favour has bias {bias!r}; give a number in -1000..1000, added to the logit")
        _refuse(not favours and bias is not None, f"bias is {bias!r}, but {self.action} has none; leave it out")
        pair = isinstance(steps, tuple | list) and len(steps) == 2 and all(type(step) is int for step in steps)
        right = steps is None or (pair and 0 <= steps[0] <= steps[1])
        _refuse(not right, f"steps are {steps!r}; they must be [first, last], whole numbers from 0, or left out")
        object.__setattr__(self, "steps", None if steps is None else tuple(steps))

    @property
    def value(self) -> float:
        """What is added to the logit; -inf: never chosen, +inf: always."""
        return {"suppress": -math.inf, "force": math.inf}.get(self.action, self.bias or 0.0)

    def active(self, step: int) -> bool:
        """Whether it is for this step."""
        return self.steps is None or self.steps[0] <= step <= self.steps[1]

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.layer}"


@dataclass(frozen=True)
class Policy:
    """Rules for experts while drawing; of none it is no policy. At most one is for an expert in any step.

    Source: biases of logits, by contrast of two groups: MoTE (arXiv 2502.11096); the row's largest logit for an expert
    that is forced: SteerMoE (arXiv 2509.09660).
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        spans = sorted((one.layer, one.expert, *(one.steps or (0, math.inf))) for one in self.rules)
        for (*who, _, end), (layer, expert, first, _) in pairwise(spans):
            twice = who == [layer, expert] and first <= end
            _refuse(twice, f"two rules are for expert {expert} of layer {layer} in step {first}")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a JSON file. ValueError where it cannot be read or is none."""
        return cls.from_dict(read_object(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """{"rules": [{"layer", "expert", "action", "bias" of favour, "steps": [first, last] or not at all}, ...]}."""
        rules = data.get("rules") if isinstance(data, Mapping) and data.keys() == {"rules"} else None
        _refuse(not isinstance(rules, list | tuple), f'it is {data!r:.100}; it must be {{"rules": [...]}}')
        for rule in cast("list[Any]", rules):
            fits = isinstance(rule, dict) and {"layer", "expert", "action"} <= rule.keys() <= {*Rule.__annotations__}
            _refuse(not fits, f"rule {rule!r:.100} must have layer, expert and action, may have bias and steps")
        return cls(tuple(Rule(**rule) for rule in cast("list[Any]", rules)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as `from_dict` takes them."""
        return {"rules": [{k: list(v) if k == "steps" else v for k, v in asdict(r).items() if v is not None}
                          for r in self.rules]}  # fmt: skip

    def check(self, rule: RoutingRule, layers: Sequence[int], experts: int, steps: int) -> None:
        """ValueError where a network with so many experts in these layers cannot follow it in so many steps."""
        _refuse(not layers, "it is for experts, and this model has none")
        if rule.kind == "dense":
            other = next((one.action for one in self.rules if one.action != "suppress"), "")
            _refuse(bool(other), f"{other} is for experts that are chosen, and all of this model serve every token")
        there = ", ".join(map(str, layers))
        for one in self.rules:
            _refuse(one.layer not in layers, f"layer {one.layer} has no experts; those that have are {there}")
            _refuse(one.expert >= experts, f"there is no {one}; it has 0 to {experts - 1}")
            limited = one.action == "force" and rule.overflow != "none"
            _refuse(limited, f"it forces {one}, but under overflow {rule.overflow} none serves every token")
            first = one.steps[0] if one.steps else 0
            _refuse(first >= steps, f"the rule for {one} begins at step {first}, but there are 0 to {steps - 1}")
        for layer in {one.layer for one in self.rules}:
            here = [one for one in self.rules if one.layer == layer]
            for first in sorted({one.steps[0] if one.steps else 0 for one in here}):
                _check_number(rule, experts, [one for one in here if one.active(first)])


def _check_number(rule: RoutingRule, experts: int, rules: Sequence[Rule]) -> None:
    """ValueError where the rules, of one layer in one step, force too many of its experts or leave too few."""
    among, size = f"experts of layer {rules[0].layer}", experts // rule.groups
    off = [one.expert // size for one in rules if one.action == "suppress"]
    on = [one.expert // size for one in rules if one.action == "force"]
    left = sorted(size - off.count(group) for group in range(rule.groups))[: rule.top_groups]  # a token's worst groups
    if rule.kind == "dense":
        _refuse(sum(left) == 0, f"it leaves 0 {among}; suppress fewer")
        return
    few, K = sum(left) + rule.null_experts, rule.top_k if rule.kind == "topk" else 1
    of = "" if rule.groups == 1 else f" in {rule.top_groups} of their groups"
    _refuse(few < K, f"it leaves {few} {among}{of}, and a token has {K}; suppress fewer")
    if rule.kind == "topk":
        _refuse(len(on) > K, f"it forces {len(on)} {among}, and a token has {K}; force fewer")
        groups = len({*on})
        _refuse(groups > rule.top_groups, f"it forces {among} in {groups} groups, and a token has {rule.top_groups}")


def _refuse(condition: bool, sentence: str) -> None:
    """ValueError with this sentence where the condition holds."""
    if condition:
        raise ValueError(f"policy: {sentence}")

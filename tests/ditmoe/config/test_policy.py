"""Policies as people write them: what is read is what is written, and what cannot be is refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from ditmoe.config.policy import Policy, Rule
from ditmoe.config.rule import RoutingRule

RULES = [
    {"layer": 1, "expert": 3, "action": "suppress"},
    {"layer": 1, "expert": 2, "action": "favour", "bias": 1.5, "steps": [0, 9]},
    {"layer": 1, "expert": 2, "action": "force", "steps": [10, 10]},
]


def test_a_file_and_back(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"rules": RULES}))
    policy = Policy.read(tmp_path / "p.json")
    assert policy.rules[1] == Rule(1, 2, "favour", 1.5, (0, 9))
    assert policy.to_dict() == {"rules": RULES}
    assert Policy.from_dict(policy.to_dict()) == policy
    assert Policy().to_dict() == {"rules": []}


def rule(**other: Any) -> dict[str, Any]:
    return {"rules": [{**RULES[0], **other}]}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], r'policy: it is \[\]; it must be {"rules": \[...\]}'),
        ({"rules": [], "name": "x"}, "it must be"),
        ({"rules": {}}, "it must be"),
        ({"rules": ["x"]}, "rule 'x' must have layer, expert and action"),
        (rule(weight=1), "must have layer, expert and action, may have bias and steps"),
        (rule(layer="block 1"), "layer is 'block 1'; it must be a whole number, 0 or more"),
        (rule(expert=-1), "expert is -1; it must be"),
        (rule(expert=True), "expert is True"),
        (rule(action="favor"), "action is 'favor'; it is suppress, force or favour"),
        (rule(action=["force"]), "action is "),
        (rule(bias=1.0), "bias is 1.0, but suppress has none; leave it out"),
        (rule(action="favour"), "favour has bias None; give a number"),
        (rule(action="favour", bias=float("nan")), "favour has bias nan"),
        (rule(action="favour", bias="1"), "favour has bias '1'"),
        (rule(steps=[3, 1]), r"steps are \[3, 1\]; they must be \[first, last\]"),
        (rule(steps=[0, 1.5]), "steps are"),
        (rule(steps=5), "steps are 5"),
        ({"rules": [*RULES, {**RULES[0], "steps": [4, 5]}]}, "two rules are for expert 3 of layer 1 in step 4"),
    ],
)
def test_what_is_no_policy_is_refused(data: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Policy.from_dict(data)


def test_many_rules_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    active = Rule.active
    monkeypatch.setattr(Rule, "active", lambda self, step: asked.append(step) or active(self, step))
    policy = Policy.from_dict({"rules": [{**RULES[0], "expert": e} for e in range(4000)]})
    policy.check(RoutingRule(2), [1], 4002, 10)
    assert len(asked) == 4000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there is no file .*p.json$"):
        Policy.read(tmp_path / "p.json")
    with pytest.raises(ValueError, match="is a folder, not a JSON file"):
        Policy.read(tmp_path)
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ValueError, match=r"p.json cannot be read as JSON"):
        Policy.read(tmp_path / "p.json")


def many(action: str, *experts: int, steps: tuple[int, int] | None = None) -> tuple[Rule, ...]:
    return tuple(Rule(1, e, action, steps=steps) for e in experts)  # type: ignore[arg-type]


TOP2, GROUPS = RoutingRule(2), RoutingRule(2, groups=4, top_groups=2)


@pytest.mark.parametrize(
    ("of", "rules", "sentence"),
    [
        (TOP2, many("suppress", *range(6)), None),
        (TOP2, many("suppress", *range(7)), "it leaves 1 experts of layer 1, and a token has 2; suppress fewer"),
        (TOP2, many("suppress", *range(4)) + many("suppress", 4, 5, 6, steps=(2, 3)), "it leaves 1 experts of layer 1"),
        (TOP2, many("suppress", *range(4), steps=(0, 1)) + many("suppress", 4, 5, 6, steps=(2, 3)), None),
        (RoutingRule(2, null_experts=1), many("suppress", *range(7)), None),
        (TOP2, many("force", 0, 1), None),
        (TOP2, many("force", 0, 1, 2), "it forces 3 experts of layer 1, and a token has 2; force fewer"),
        (RoutingRule(2, kind="relative"), many("force", *range(8)), None),
        (RoutingRule(2, kind="relative"), many("suppress", *range(8)), "it leaves 0 experts of layer 1"),
        (RoutingRule(2, kind="expert_choice"), many("suppress", *range(7)), None),
        (RoutingRule(2, overflow="order"), many("force", 1), "it forces expert 1 of layer 1, but under overflow order"),
        (RoutingRule(1, kind="dense"), many("suppress", 1), None),
        (RoutingRule(1, kind="dense"), many("suppress", *range(8)), "it leaves 0 experts of layer 1; suppress"),
        (RoutingRule(1, kind="dense"), many("force", 1), "force is for experts that are chosen, and all of this model"),
        (TOP2, (Rule(2, 0, "suppress"),), "layer 2 has no experts; those that have are 1, 3"),
        (TOP2, many("suppress", 8), "there is no expert 8 of layer 1; it has 0 to 7"),
        (TOP2, many("suppress", 1, steps=(20, 30)), "the rule for expert 1 of layer 1 begins at step 20, but there"),
        (TOP2, many("suppress", 1, steps=(19, 30)), None),
        (GROUPS, many("suppress", 0, 2), None),
        (GROUPS, many("suppress", 0, 1, 2), "it leaves 1 experts of layer 1 in 2 of their groups, and a token has 2"),
        (RoutingRule(2, groups=4), many("force", 0, 7), "it forces experts of layer 1 in 2 groups, and a token has 1"),
    ],
)  # fmt: skip
def test_what_a_network_cannot_follow_is_refused(
    of: RoutingRule, rules: tuple[Rule, ...], sentence: str | None
) -> None:
    if sentence is None:
        Policy(rules).check(of, [1, 3], 8, 20)
    else:
        with pytest.raises(ValueError, match=sentence):
            Policy(rules).check(of, [1, 3], 8, 20)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="policy: it is for experts, and this model has none"):
        Policy(many("suppress", 1)).check(TOP2, [], 8, 1)

"""What a page asks for: options of `sample.py`, as words of an address; and the command and the Python that draw it.

A link and a command line have the same words: `?classes=Sneaker&steps=20` is `--classes Sneaker --steps 20`.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samplers import SAMPLERS

from ..config.checks import near, plural
from ..config.policy import Policy
from ..config.sample import SampleArgs, label_or_name
from ..model import count_parameters, moe_layer_names
from ..pipeline import DiTMoEPipeline
from ..pipeline.asked import names_of
from ..pipeline.guide import EXPERTS_OFF, NONE

MOST_IMAGES = 16  # of one drawing
MOST_RULES = 1000  # of its policy
POLICY = "policy"

Query = Mapping[str, Sequence[str]]


def _guide(word: str) -> str:
    if word not in (EXPERTS_OFF, NONE):
        raise ValueError
    return word


# how a word is read, what it is, how many there are (None: any number)
FIELDS: dict[str, tuple[Callable[[str], Any], str, int | None]] = {
    "classes": (label_or_name, "the label or the name of every image's class", None),
    "num": (int, "a whole number", 1),
    "seed": (int, "a whole number, 0 or more", 1),
    "sampler": (str, "a name of samplers.SAMPLERS", 1),
    "steps": (int, "a whole number, 1 or more", 1),
    "cfg": (float, "a number, 1 for none", 1),
    "guidance-interval": (float, "two numbers, the lowest and the highest timestep", 2),
    "guide": (_guide, f"{EXPERTS_OFF} or {NONE}", 1),
    "guide-scale": (float, "a number, 1 for none", 1),
    "eta": (float, "a number in 0..1", 1),
    "tau": (str, "a number, or LOW-HIGH=TAU for a span of time", None),
}  # fmt: skip

CALL = {"classes": "class_labels", "num": "num_images", "steps": "num_inference_steps", "cfg": "guidance_scale"}


def read(query: Query, model: Path) -> tuple[SampleArgs, Policy | None]:
    """The options that an address asks for, in float32 as a page draws; and the policy beside them, None for none.

    Raises ValueError, a sentence, for a setting that there is not, and a value that it cannot have.
    """
    known = [*FIELDS, POLICY]
    if unknown := [name for name in query if name not in known]:
        hint = near(unknown[0], known)
        raise ValueError(f"there is no setting {unknown[0]!r:.60}; {hint}settings are {', '.join(known)}")
    found = {name.replace("-", "_"): _value(name, words) for name, words in query.items() if name != POLICY}
    args = SampleArgs(model=model, precision="fp32", **found)
    for name, count in (("classes", len(args.classes or ())), ("num", args.num or 0)):
        if count > MOST_IMAGES:
            raise ValueError(f"{name} asks for {count} images; a page draws up to {MOST_IMAGES}, sample.py any number")
    if args.classes is None and args.num is None:
        raise ValueError("no image is asked for; give classes, or num of a model without labels")
    return args, _policy(query.get(POLICY, ()))


def _value(name: str, words: Sequence[str]) -> Any:
    kind, what, count = FIELDS[name]
    if count is not None and len(words) != count:
        raise ValueError(f"{name} has {plural(len(words), 'value')}; give {what}")
    try:
        values = tuple(kind(word) for word in words)
    except ValueError:
        raise ValueError(f"{name} is {' '.join(words)!r:.60}; give {what}") from None
    return values[0] if count == 1 else values


def _policy(words: Sequence[str]) -> Policy | None:
    """The policy that a word of JSON is; None where it has no rules, or there is no word."""
    if not words:
        return None
    try:
        (word,) = words
        found = json.loads(word)
    except (ValueError, RecursionError):
        raise ValueError(f"policy is {' '.join(words)!r:.60}; give one JSON object") from None
    rules = found.get("rules") if isinstance(found, dict) else None
    if isinstance(rules, list) and len(rules) > MOST_RULES:
        raise ValueError(f"policy has {len(rules)} rules; a page draws by up to {MOST_RULES}, sample.py by any number")
    return Policy.from_dict(found) if found != {"rules": []} else None


def command(query: Query, args: SampleArgs, policy: Policy | None) -> str:
    """The command line that draws what `read` found; before it a line that writes its policy, if any."""
    words, before = ["python", "-m", "ditmoe", "sample", str(args.model)], ""
    for name, values in query.items():
        if name != POLICY:
            words += [f"--{name}", *values]
        elif policy:
            text = json.dumps(policy.to_dict())
            file = f"policy-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"  # no other one's
            words += ["--policy", file]
            before = f"echo {shlex.quote(text)} > {file}\n"
    return before + shlex.join([*words, "--precision", args.precision, "--out", "drawn.png"])


def python(query: Query, args: SampleArgs, policy: Policy | None) -> str:
    """The Python that draws it."""
    values = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in query if name != POLICY}
    values |= {"tau": args.tau_spans()} if args.tau else {}
    values |= {POLICY: policy.to_dict()} if policy else {}
    lines = [f"    {CALL.get(name, name)}={_shown(value)},\n" for name, value in values.items()]
    before = "from pathlib import Path\nfrom ditmoe import pipeline\n\n"
    loaded = f"pipe = pipeline.load(Path({str(args.model)!r}), fast=True)\n"
    return f"{before}{loaded}images = pipe(\n{''.join(lines)}).images"


def _shown(value: Any) -> str:
    return repr([*value] if isinstance(value, tuple) and not isinstance(value[0], float) else value)


def word_of(label: int, names: Mapping[int, str]) -> str:
    """What a label is called in an address: its name, or the number where that says more."""
    name = names.get(label, "").strip()
    plain = names_of(names).get(name) == [label] and isinstance(label_or_name(name), str) and not name.startswith("-")
    return name if plain else str(label)


def described(pipe: DiTMoEPipeline, model: Path) -> dict[str, Any]:
    """What a page is told of a model, as JSON values."""
    net, config = pipe.transformer, pipe.config
    C, side = net.config, net.config.sample_size // net.config.patch_size
    labels = sorted(pipe.id2label) or range(C.num_classes)
    _, scale = pipe.guide_for()
    saved = EXPERTS_OFF if config.experts_off else "weaker model" if pipe.guide is not None else ""
    total, active = count_parameters(net)
    classes = [[word_of(c, pipe.id2label), pipe.id2label.get(c, str(c)), str(c)] for c in labels]
    return {
        "model": str(model), "classes": classes,
        "size": pipe.image_shape[1], "side": side, "parameters": total, "activated": active,
        "layers": [int(name.split()[-1]) for name in moe_layer_names(net)], "experts": C.num_experts,
        "samplers": list(SAMPLERS), "saved_guide": saved, "most": MOST_IMAGES,
        "actions": ["suppress"] if net.rule.kind == "dense" else ["suppress", "force"],  # of a click
        "by_place": C.router_input == "position",
        "defaults": {
            "sampler": config.sampler or "", "steps": config.num_inference_steps, "cfg": config.guidance_scale,
            "guidance-interval": config.guidance_interval or [0, 1000], "guide-scale": scale, "seed": 0,
        },
    }  # fmt: skip

"""config.json out and in: one writer, one reader, what differs between two, types of values from others."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..files import read_object, write_json
from .checks import MOST, near
from .sections import Config

Section = TypeVar("Section")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON values (paths become text)."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return tree


def save(config: Config, path: Path) -> None:
    """Write the configuration as JSON, whole or not at all."""
    write_json(path, to_dict(config))


def read_file(path: Path, what: str = "a configuration that can be read", needed: Sequence[str] = ()) -> Config:
    """The configuration in a file. What an older version did not write has its default.

    Args:
        path: A JSON file as `save` writes it.
        what: What the file is not, in the words of a refusal.
        needed: What has to be in it.

    Raises:
        ValueError: The file cannot be read, or a name, a type or a value in it is none of ours.
    """
    try:
        values = read_object(path)
    except ValueError as error:
        why = error.__cause__ or "it holds no JSON object"
        why = "there is no such file" if isinstance(why, FileNotFoundError) else why
        raise ValueError(f"{path} is not {what}: {why}") from error
    try:
        if missing := [name for name in needed if name not in values]:
            raise ValueError(f"it has no {missing[0]}")
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {error}") from error


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` gave. ValueError where a name, a type or a value is none of ours."""
    train = values.get("train")
    if isinstance(train, dict) and "tensorboard" in train:  # of a version before there were other trackers
        known = {name: value for name, value in train.items() if name != "tensorboard"}
        values = {**values, "train": {"tracker": "tensorboard" if train["tensorboard"] else "none", **known}}
    distill = values.get("distill")
    if isinstance(distill, dict) and distill.get("features", "") is None:  # of a version that had them
        values = {**values, "distill": {n: v for n, v in distill.items() if n not in ("features", "features_weight")}}
    return _built(Config, values)


def read_config(run: Path, name: str = "config.json") -> Config:
    """The configuration of a run folder, or with "training.json" of an exported model.

    Raises:
        ValueError: The file is missing or is none of ours.
    """
    return read_file(run / name, "the configuration of a run", needed=("out", "data"))


def trained_by(model: Path) -> Config:
    """The configuration that trained what is in a run folder, in its model/, or in an exported folder.

    Raises:
        ValueError: There is none, or it is none of ours.
    """
    for folder, name in ((model, "config.json"), (model, "training.json"), (model.parent, "config.json")):
        if (folder / name).is_file():
            return read_config(folder, name)
    raise ValueError(f"{model} has neither config.json nor training.json, which say how it was trained; give a run")


def known(model: Path) -> Config | None:
    """As `trained_by`; None where nothing says."""
    with suppress(ValueError):
        return trained_by(model)
    return None


def drops_labels(model: Path) -> bool:
    """Whether its run left labels out, so that guidance has an answer without them; True where nothing says."""
    config = known(model)
    return config is None or config.objective.class_dropout_prob > 0


def _built(section: type[Section], values: Mapping[str, Any]) -> Section:
    """A section of the configuration, itself checked, of what a file holds."""
    hints = get_type_hints(section)
    if unknown := [name for name in values if name not in hints]:
        raise ValueError(f"it has {unknown[0]}, which is unknown; {near(unknown[0], hints)}rename it, or leave it out")
    found = {name: _value(value, hints[name]) for name, value in values.items()}
    check_types(found, hints)
    return section(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def _value(value: Any, hint: Any) -> Any:
    if isinstance(value, dict) and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _built(hint, value)
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """ValueError unless every value has the type that its name is annotated with."""
    for name, hint in hints.items():
        if name in values and not _has_type(values[name], hint):
            raise ValueError(f"{name} is {values[name]!r:.100}, which it cannot be")


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:  # a list in JSON
        parts = get_args(hint)
        if not isinstance(value, list | tuple) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            return False
        return all(_has_type(each, parts[0]) for each in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= MOST
    return isinstance(value, hint)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Sentences `section.field: old -> new` for every leaf that differs."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def as_flags(values: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """JSON values of a configuration, or of a part of it, as command-line flags."""
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            yield from as_flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield f"{prefix}{'' if value else 'no-'}{name}"
        elif isinstance(value, list):
            yield from (f"{prefix}{name}", *map(str, value))
        else:
            yield from (f"{prefix}{name}", str(value))

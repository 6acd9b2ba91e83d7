"""config.json out and in: one writer, one reader, what differs between two, types of values from others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .sections import Config


def check_run(config: Config) -> None:
    """ValueError unless every value of a configuration has the type of its field."""
    for section in (config, *vars(config).values()):
        if dataclasses.is_dataclass(section):
            check_types(vars(section), get_type_hints(type(section)))


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """ValueError unless every value has the type that its name is annotated with."""
    for name, hint in hints.items():
        if name in values and not _has_type(values[name], hint):
            raise ValueError(f"{name} is {values[name]!r:.100}, which it cannot be")


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 1e30
    return isinstance(value, hint)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON values (paths become text)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    tree: dict[str, Any] = plain(dataclasses.asdict(config))
    return tree


def save(config: Config, path: Path) -> None:
    """Write the configuration as JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    temporary.replace(path)


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


def as_flags(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A saved configuration as command-line flags, so that one parser checks files and flags alike."""
    for key, value in values.items():
        flag = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from as_flags(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            section, _, name = flag.rpartition(".")
            yield "--" + (f"{section}." if section else "") + ("" if value else "no-") + name
        else:
            yield from (f"--{flag}", str(value))


pass


def read_config(run: Path, name: str = "config.json") -> Config:
    """The configuration of a run folder, or with "training.json" of an exported model.

    Raises:
        ValueError: The file is missing or is none of ours.
    """
    path = run / name
    try:
        values = json.loads(path.read_text())
        values["out"] = Path(values["out"])
        for place in ("path", "vae"):
            if values["data"].get(place) is not None:
                values["data"][place] = Path(values["data"][place])
        for field in dataclasses.fields(Config):
            if callable(field.default_factory):
                values[field.name] = field.default_factory(
                    **values.get(field.name, {})
                )  # {}: an older version wrote it
        config = Config(**values)
        check_run(config)
        return config
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error

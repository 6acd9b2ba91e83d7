"""Settings that somebody else may have written: their types and ranges, before anything is built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from inspect import signature
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .config import Config, ModelConfig, MoEConfig
from .model import DiTMoETransformer2DModel


def check_network(values: Mapping[str, Any]) -> None:
    """ValueError unless these are settings of a network that can be built and used, whatever its weights are."""
    make = DiTMoETransformer2DModel.__init__
    _check_types(values, get_type_hints(make))
    c = {**{name: p.default for name, p in signature(make).parameters.items()}, **values}
    ModelConfig(**{f.name: c[f.name] for f in dataclasses.fields(ModelConfig) if f.name in c})
    widths = {name: c[name] for name in ("num_experts", "top_k", "expert_width", "shared_width")}
    MoEConfig(**widths, scale=c["router_scale"], renormalize=False)


def check_run(config: Config) -> None:
    """ValueError unless every value of a configuration has the type of its field."""
    for section in (config, *vars(config).values()):
        if dataclasses.is_dataclass(section):
            _check_types(vars(section), get_type_hints(type(section)))


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
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

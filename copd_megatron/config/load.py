"""YAML and `key=value` overrides to a checked description; every complaint names the key and what it should be."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from copd_megatron.errors import ConfigError
from copd_megatron.files import write_atomic

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str], model: type[Model]) -> Model:
    """Read `path`, apply `overrides`, resolve ${…} references and check against `model`.

    An override is `dotted.key=value`; `branches.0.key=value` reaches the items of a list.

    Raises ConfigError for a missing or malformed file, an unknown key (with the nearest valid one) or a bad value.
    """
    return check(read_yaml(path, overrides), model, str(path))


def read_yaml(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Any:
    """The content of `path` with `overrides`, its references resolved, not checked against anything.

    Raises ConfigError for a missing or malformed file.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file")
    try:
        content = OmegaConf.load(file)
        for override in overrides:
            _put(content, override)
        return OmegaConf.to_container(content, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: {error}") from error


def _put(content: DictConfig | ListConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: expected key=value, for example rl.prompts=32")
    value = OmegaConf.from_dotlist([f"value={text}"])["value"]
    try:
        # One by one, not as a merge, in which the keys of a list's items (branches.0.parallel) have no place.
        OmegaConf.update(content, key, value, merge=True)
    except (OmegaConfBaseException, AssertionError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"override {override!r}: there is nothing at {key!r} to set: {reason}") from error


def check(plain: Any, model: type[Model], origin: str) -> Model:
    """`plain` as a `model`, or a ConfigError that lists every problem on a line of its own."""
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(detail, model)}" for detail in error.errors())
        raise ConfigError(f"{origin}: the configuration is not valid\n{problems}") from error


def save_config(config: BaseModel, path: str | os.PathLike[str]) -> None:
    """Write the resolved description, defaults included, as YAML."""
    write_atomic(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two plain descriptions differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} -> {new!r}"]


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in detail["loc"]) or "(top level)"
    if detail["type"] == "extra_forbidden":
        known = _keys_at(model, detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{where}: required, but not given"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')} (found {detail['input']!r:.200})"


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Field names of the model that a location leads to."""
    current: list[type[BaseModel]] = [model]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [candidate.model_fields[part] for candidate in current if part in candidate.model_fields]
        current = [found for field in fields for found in _models_in(field.annotation)] or current
    return sorted({name for candidate in current for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]

"""Nested keys and values, as YAML holds them, against dataclasses: overrides, types of fields, differences.

A key that is not a field is refused by its name, with the nearest field; so is a value of the wrong type.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_image_fast.extras import needed_for
from qwen_image_fast.folders import read_text


class RecipeError(ValueError):
    """A sentence about what a recipe must be."""


def must(condition: bool, name: str, rule: str, value: Any) -> None:
    """RecipeError "recipe: <name> must <rule>, got <value>" unless the condition holds."""
    if not condition:
        raise RecipeError(f"recipe: {name} must {rule}, got {value!r}")


def must_be_at_least(least: float, name: str, value: float) -> None:
    must(value >= least, name, f"be at least {least}", value)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """What a YAML file and its overrides say, not yet checked."""
    with needed_for("reading a recipe"):
        import yaml

    if Path(path).is_dir():
        raise RecipeError(f"recipe: {path} is a folder, not a YAML file")
    try:
        tree = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe: {path} must be valid YAML: {error}") from error
    return overridden(tree, overrides)


def overridden(tree: Any, overrides: Sequence[str]) -> Any:
    """`tree`, in place, with the fields that overrides such as "optimizer.lr=1e-3" change."""
    with needed_for("reading a recipe"):
        import yaml

    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise RecipeError(f"recipe: an override must look like optimizer.lr=1e-3, got {override!r}")
        try:
            set_dotted(tree, name, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe: {override} must hold valid YAML: {error}") from error
    return tree


def merged(common: dict[str, Any], own: dict[str, Any], kind: type) -> dict[str, Any]:
    """`own` over `common`, group by group; a list or a table of free names is replaced as a whole."""
    hints, both = typing.get_type_hints(kind), dict(common)
    for name, value in own.items():
        group = hints.get(name)
        groups = isinstance(value, dict) and isinstance(common.get(name), dict) and dataclasses.is_dataclass(group)
        both[name] = merged(common[name], value, group) if groups else value  # type: ignore[arg-type]
    return both


def set_dotted(tree: Any, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree[_place(tree, parent, name)] if isinstance(tree, list) else tree.setdefault(parent, {})
        if not isinstance(tree, (dict, list)):
            raise RecipeError(f"recipe: {name} must name a field, but {parent} has a value of its own")
    tree[_place(tree, last, name) if isinstance(tree, list) else last] = value


def _place(items: list[Any], number: str, name: str) -> int:
    if not (number.isdecimal() and int(number) < len(items)):
        raise RecipeError(f"recipe: {name} must have a number from 0 to {len(items) - 1} instead of {number}")
    return int(number)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two recipes differ, as "optimizer.lr: 0.001 -> 0.01"."""
    found = []
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif _alike(a, b):
            for place, (x, y) in enumerate(zip(a, b)):
                found += differences(x, y, f"{prefix}{name}.{place}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return found


def _alike(a: Any, b: Any) -> bool:
    """Lists of as many objects each."""
    lists = isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
    return lists and all(isinstance(entry, dict) for entry in [*a, *b])


def convert(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`, a dataclass or a type of its fields; RecipeError names the field that does not fit."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict):
            raise RecipeError(f"recipe: {path} must hold fields ({', '.join(hints)}), got {value!r}")
        dot = f"{path}." if path else ""
        for name in value:
            if name not in hints:
                raise RecipeError(f"recipe: there is no field {dot}{name}{_nearest(str(name), hints, dot)}")
        return kind(**{name: convert(v, hints[name], dot + name) for name, v in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is list and isinstance(value, list):
        return [convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        if tight := [name for name, v in value.items() if v is None and ":" in str(name)]:
            raise RecipeError(f"recipe: {path} needs a space behind the colon: {str(tight[0]).replace(':', ': ', 1)}")
        return {str(k): convert(v, args[1], f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    elif kind is str and value is None:
        return ""
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    word = str(kind) if isinstance(kind, types.GenericAlias) else kind.__name__
    raise RecipeError(f"recipe: {path} must be {word}, got {value!r}")


def _nearest(name: str, fields: dict[str, Any], dot: str) -> str:
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6) or [f for f in fields if _shortens(f, name.lower())]
    return f"; did you mean {dot}{near[0]}?" if near else f"; fields: {', '.join(fields)}"


def _shortens(short: str, name: str) -> bool:
    """Whether a field's name is an abbreviation, as lr of learnrate or learning_rate."""
    letters = iter(name)
    return len(short) <= 3 and short[0] == name[0] and all(letter in letters for letter in short)

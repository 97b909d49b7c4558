"""What the fields of a recipe mean, from the docstrings that say it, and a recipe written out with that beside it."""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.recipe.curriculum import Curriculum
from qwen_image_fast.training.recipe.fields import differences
from qwen_image_fast.training.recipe.flow import FlowRecipe


def meanings(kind: type) -> dict[str, str]:
    """Of each field of a dataclass the sentences behind `name: ` or `name, other: ` in its docstring or a base's."""
    names = "|".join(field.name for field in dataclasses.fields(kind))
    heading = re.compile(rf"(?<![\w.`\"])((?:{names})(?:, (?:{names}))*): ")
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        text = " ".join((cls.__dict__.get("__doc__") or "").split())
        if text.startswith(f"{cls.__name__}("):  # what dataclass writes where there is none
            continue
        headings = list(heading.finditer(text))
        for match, following in zip(headings, [*headings[1:], None]):
            meaning = text[match.end() : following.start() if following else len(text)].strip()
            found |= dict.fromkeys(match[1].split(", "), meaning)
    return found


def written_out(run: Curriculum) -> str:
    """A recipe in YAML, every field with its value and, as a comment above it, its meaning.

    Of a run of stages the first one so, and what differs in the others as comments."""
    first = run.stages[0].recipe
    lines = [*_group(first, type(first), "")]
    for stage in run.stages[1:]:
        changes = differences(dataclasses.asdict(first), dataclasses.asdict(stage.recipe))
        lines += [
            "",
            f"# stage {stage.name}, after step {stage.first}, in which there differ",
            *(f"#   {c}" for c in changes),
        ]
    return "\n".join(lines)


def _group(group: Any, kind: type, indent: str) -> Iterator[str]:
    means, hints = meanings(kind), typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    # The plain fields first, so that a group is not cut in two.
    for name in sorted(fields, key=lambda name: dataclasses.is_dataclass(hints[name])):
        value = getattr(group, name)
        if dataclasses.is_dataclass(hints[name]):
            yield ""
            yield f"{indent}{name}:"
            yield from _group(value, typing.cast(type, hints[name]), indent + "  ")
            continue
        yield from (f"{indent}# {line}" for line in textwrap.wrap(means.get(name, ""), 110 - len(indent)))
        yield f"{indent}{name}: {_yaml(value)}"


def _yaml(value: Any) -> str:
    with needed_for("writing a recipe"):
        import yaml

    if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
        value = [dataclasses.asdict(entry) for entry in value]  # type: ignore[call-overload]
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def field_like(word: str) -> str:
    """The field of a recipe of kind flow whose name is nearest to a word, such as "optimizer.lr" for "lr"; or ""."""
    fields: dict[str, str] = {}

    def gather(tree: dict[str, Any], before: str) -> None:
        for name, value in tree.items():
            fields.setdefault(name, before + name)
            if isinstance(value, dict):
                gather(value, f"{before}{name}.")

    gather(dataclasses.asdict(FlowRecipe()), "")
    near = difflib.get_close_matches(word, fields, n=1, cutoff=0.7)
    return fields[near[0]] if near else ""

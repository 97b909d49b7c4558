"""What a recipe leaves to the model that it names: sizes of pictures, other numbers for a small model; cards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_image_fast.folders import local_folder
from qwen_image_fast.model_defaults import generation_of, model_class
from qwen_image_fast.training.recipe.fields import RecipeError, merged, overridden, read_tree
from qwen_image_fast.training.recipe.flow import NEW, FlowRecipe
from qwen_image_fast.training.recipe.kinds import KINDS

SMALL = "small"  # a group of a recipe's file: what stands in it holds, instead, for small models
SMALL_AREA = 256 * 256  # pixels of a small model's pictures at most
CARDS = {"12gb": 12.0, "16gb": 16.0, "24gb": 24.0, "48gb": 48.0, "80gb": 80.0}  # --preset: GB of the card
# [height, width] of a model whose pictures are larger: about a million pixels in five shapes.
LARGE = [[1024, 1024], [1152, 896], [896, 1152], [1344, 768], [768, 1344]]


def read_fitted(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """What a recipe's file and its overrides say, with what is left to the model; not yet checked."""
    tree = read_tree(path)
    if not isinstance(tree, dict):
        return tree
    small, asked = tree.pop(SMALL, {}), overridden(copy.deepcopy(tree), overrides)
    model = asked.get("model") if isinstance(asked.get("model"), dict) else {}
    name, size = model.get("folder") or "", None
    if isinstance(name, str) and name not in ("", NEW):
        size = picture_size(name)
        if size is not None:
            tree = merged(tree, small, KINDS.get(str(tree.get("kind", "flow")), FlowRecipe))
    elif name == NEW or model.get("train_text_encoder", True):
        return overridden(tree, overrides)  # a model from nothing, whose pictures are what it is shown
    data, said = tree.get("data") or {}, asked.get("data") or {}
    if tree.get("kind", "flow") != "vae" and not ({"buckets", "sides"} & set(said)):
        tree["data"] = {**data, "buckets": [list(size)] if size else LARGE}
    return overridden(tree, overrides)


def picture_size(name: str) -> tuple[int, int] | None:
    """Height and width of the pictures of a small model, as its `generation.json` says; None for any other."""
    try:
        folder = local_folder(name)
        own = None if folder is None else generation_of(folder, model_class(folder, name))
    except (OSError, ValueError):  # said where models are looked for
        return None
    if own is None or own.height is None or own.width is None or own.height * own.width > SMALL_AREA:
        return None
    return own.height, own.width


def card(preset: str) -> float:
    """GB of the card of a preset; RecipeError where there is none of that name."""
    if preset not in CARDS:
        raise RecipeError(f"preset: --preset must be one of {', '.join(CARDS)}, got {preset!r}")
    return CARDS[preset]

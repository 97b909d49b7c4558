"""Data sets of Hugging Face's hub: downloaded once into its cache, then read as a folder."""

from __future__ import annotations

from pathlib import Path

from qwen_image_fast.folders import HUB_NAME
from qwen_image_fast.training.recipe.fields import RecipeError

HUB = "hub:"


def dataset_folder(source: str) -> Path:
    """The local copy of "hub:owner/name"; RecipeError where it cannot be had."""
    name = source.removeprefix(HUB)
    if not HUB_NAME.fullmatch(name):
        raise RecipeError(f"recipe: data.source must be {HUB}owner/name for a data set of the hub, got {source!r}")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset"))
    except errors.GatedRepoError as error:
        raise RecipeError(f"recipe: data.source {name} asks to accept its terms on the hub; then log in") from error
    except errors.RepositoryNotFoundError as error:
        raise RecipeError(f"recipe: data.source: the hub has no readable data set {name}") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise RecipeError(
            f"recipe: data.source {name} is not in the hub's cache, and the hub was not reached; download it, or name "
            "a folder"
        ) from error

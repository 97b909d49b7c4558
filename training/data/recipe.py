"""The recipe of `qwen-image-fast data filter`: sources, stages, thresholds. Unknown keys are refused by name.

The report names its filters and prints no thresholds. Those here are ours: set so that scikit-image's photographs pass
and plainly degraded copies of them do not (tests/training/test_data_filters.py). Set your own from the audit's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_image_fast.training.recipe.fields import RecipeError, convert, merged, overridden, read_tree

from .filters.duplicates import LARGEST_DISTANCE
from .filters.order import FILTER_NAMES
from .presets import PRESETS
from .record import CAPTION_SETS, CATEGORIES

# Of vectors in memory, by faiss' name of it.
PRECISIONS = {"float32": "Flat", "float16": "SQfp16"}


@dataclass
class SourceRecipe:
    """Arguments of `collect.collect`. source, licence, category: of records that do not say their own."""

    path: str = ""
    source: str = ""
    licence: str = ""
    category: str = ""
    image_column: str = "image"


@dataclass
class CurationRecipe:
    """Stage 1. Bytes of the file, pixels of the shorter side and in all, longer over shorter side, bits of the
    perceptual hash (0 to 7), probability of open_nsfw."""

    min_bytes: int = 2_000
    max_bytes: int = 100_000_000
    min_side: int = 256
    max_pixels: int = 100_000_000
    max_aspect: float = 3.0
    duplicate_bits: int = 4
    max_nsfw: float = 0.8


@dataclass
class QualityRecipe:
    """Stage 2. Energy of the Laplacian over the gradient's, mean luma and saturation of 1, bits, deviation of noise."""

    min_clarity: float = 0.4
    min_luma: float = 0.06
    max_luma: float = 0.93
    max_saturation: float = 0.85
    min_entropy: float = 2.5
    max_texture: float = 16.0


@dataclass
class CaptionRecipe:
    """Stage 3. Tokens (words, where there is no tokenizer), share of new words, cosine; folders of the models.

    Without chinese_clip and siglip, alignment is not measured. sets: shares of the sets raw, recaption and fused, of
    which each record joins one that it has the captions for; empty: each keeps its best caption.
    """

    min_tokens: int = 3
    max_tokens: int = 1024
    tokenizer: str = ""
    min_new_words: float = 0.3
    min_alignment: float = 0.1
    chinese_clip: str = ""
    siglip: str = ""
    sets: dict[str, float] = field(default_factory=dict)


@dataclass
class TextRecipe:
    """Stage 4. Share of the area under text, height of a line over the shorter side."""

    max_area: float = 0.5
    min_height: float = 0.02


@dataclass
class RefinementRecipe:
    """Stage 5. Pixels of the shorter side, blockiness, share of the shorter side in a border, how far a
    pattern that repeats stands out."""

    min_side: int = 640
    max_blockiness: float = 1.8
    max_border: float = 0.04
    max_watermark: float = 30.0


@dataclass
class BalanceRecipe:
    """Stages 6 and 7. max_mosaic: score of `FaceMosaic`. categories: shares to reach by dropping; empty: as they come.

    tail, power: a node of n records keeps n up to `tail`, else tail (n / tail)^power, the best by the score `best_by`;
    power 1 keeps all. A record's node is its metadata's `node`, else its category.
    """

    max_mosaic: float = 0.55
    categories: dict[str, float] = field(default_factory=dict)
    tail: int = 1000
    power: float = 1.0
    best_by: str = "clarity"


@dataclass
class RayRecipe:
    """Of `data filter --engine ray`. address: of a cluster; empty: the one of the environment, or one on this machine.
    cpus, gpus: of each worker; with gpus, the models of the filters are there."""

    address: str = ""
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass
class FilterRecipe:
    """stages: those to run, always in order. without: names of filters to leave out.

    Records of the category Synthetic enter at stage 4, as in the report; of the stages before, only stage 1 is theirs.
    shard_records: of a shard of the result. sheet: rejected pictures on the contact sheet; 0: none.
    """

    sources: list[SourceRecipe] = field(default_factory=list)
    stages: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6, 7])
    without: list[str] = field(default_factory=list)
    seed: int = 0
    shard_records: int = 1000
    sheet: int = 48
    curation: CurationRecipe = field(default_factory=CurationRecipe)
    quality: QualityRecipe = field(default_factory=QualityRecipe)
    captions: CaptionRecipe = field(default_factory=CaptionRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    refinement: RefinementRecipe = field(default_factory=RefinementRecipe)
    balance: BalanceRecipe = field(default_factory=BalanceRecipe)
    ray: RayRecipe = field(default_factory=RayRecipe)


@dataclass
class AnnotateRecipe:
    """`qwen-image-fast data annotate`.

    endpoint: base address of OpenAI's chat completions, with the version; empty: `model` is a folder of transformers.
    model: a name at the endpoint, or a Qwen2.5-VL's folder. api_key_file: a file with the key; empty: none.
    parallel: requests at once. timeout: seconds of one. attempts: for a picture, of failures and of bad answers.
    backoff: seconds before the second attempt, doubled each time. give_up_after: pictures in a row that the endpoint
    failed, or answered with nothing of use. max_side: pixels of the longer side that the model sees. options: further
    fields of the request. question: what the caption should be, in your words; empty: a detailed paragraph. language:
    of the caption, such as Chinese. trigger: words put before every caption. beside: write each caption as `<name>.txt`
    beside its picture, where there is none; of sources that are folders of pictures.
    """

    sources: list[SourceRecipe] = field(default_factory=list)
    endpoint: str = ""
    model: str = ""
    api_key_file: str = ""
    parallel: int = 4
    timeout: float = 120.0
    attempts: int = 4
    backoff: float = 1.0
    give_up_after: int = 20
    max_side: int = 1024
    max_pixels: int = 100_000_000
    max_tokens: int = 1500
    temperature: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    question: str = ""
    language: str = "English"
    trigger: str = ""
    beside: bool = False
    shard_records: int = 1000


@dataclass
class GapRecipe:
    """A node of the taxonomy to fill. count: records that it should have, with those of `have`.

    texts, pictures: what they should be like, in words and, with `by: pictures`, files; neither: the node's name.
    category: of those that are taken and have none. least: smallest cosine of one that is taken.
    """

    node: str = ""
    count: int = 0
    texts: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    category: str = ""
    least: float = 0.0


@dataclass
class RetrieveRecipe:
    """`qwen-image-fast data retrieve`.

    sources: where to look. have: folders of shards of the data set with the gaps: what it has counts, and is not taken
    again. by: "captions", whose vectors are of the text encoder in `model`, a pipeline's folder or tiny, or "pictures",
    of `model`, a SigLIP 2 or Chinese-CLIP of transformers. precision: of the vectors in memory, float32 or float16.
    """

    sources: list[SourceRecipe] = field(default_factory=list)
    have: list[str] = field(default_factory=list)
    by: str = "captions"
    model: str = ""
    gaps: list[GapRecipe] = field(default_factory=list)
    precision: str = "float32"
    max_pixels: int = 100_000_000
    shard_records: int = 1000


def read_retrieve_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RetrieveRecipe:
    """The checked recipe in a YAML file, as `read_filter_recipe`."""
    recipe = convert(read_tree(path, overrides), RetrieveRecipe, "")
    _check_sources(recipe.sources)
    _must(recipe.by in ("captions", "pictures"), "by", "be captions or pictures", recipe.by)
    _must(bool(recipe.model), "model", "be a folder, see training/data/recipe.py", recipe.model)
    _must(recipe.precision in PRECISIONS, "precision", f"be of {', '.join(PRECISIONS)}", recipe.precision)
    _must(recipe.shard_records >= 1, "shard_records", "be at least 1", recipe.shard_records)
    for folder in recipe.have:
        index = Path(folder).expanduser() / "index.parquet"
        _must(index.is_file(), "have", "name folders of shards, which have an index.parquet", folder)
    nodes = [gap.node for gap in recipe.gaps]
    _must(bool(nodes) and all(nodes) and len(set(nodes)) == len(nodes), "gaps", "name different nodes", nodes)
    for gap in recipe.gaps:
        name = f"gaps, of {gap.node}: "
        _must(gap.count >= 1, f"{name}count", "be at least 1", gap.count)
        _must(gap.category in ("", *CATEGORIES), f"{name}category", f"be of {', '.join(CATEGORIES)}", gap.category)
        _must(-1 <= gap.least <= 1, f"{name}least", "be a cosine, from -1 to 1", gap.least)
        _must(not gap.pictures or recipe.by == "pictures", f"{name}pictures", "be empty with `by: captions`",
              gap.pictures)  # fmt: skip
        _must(all(text.strip() for text in gap.texts), f"{name}texts", "have words each", gap.texts)
        for file in gap.pictures:
            _must(Path(file).expanduser().is_file(), f"{name}pictures", "be files that are there", file)
    return recipe


def read_annotate_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnnotateRecipe:
    """The checked recipe in a YAML file, as `read_filter_recipe`."""
    recipe = convert(read_tree(path, overrides), AnnotateRecipe, "")
    _check_sources(recipe.sources)
    _must(bool(recipe.model), "model", "be a name at the endpoint, or a folder", recipe.model)
    _must(bool(recipe.language.strip()), "language", "be the name of a language", recipe.language)
    for name in ("parallel", "attempts", "give_up_after", "max_side", "max_tokens", "shard_records"):
        _must(getattr(recipe, name) >= 1, name, "be at least 1", getattr(recipe, name))
    _must(recipe.timeout > 0, "timeout", "be above 0", recipe.timeout)
    for name in ("backoff", "temperature"):
        _must(getattr(recipe, name) >= 0, name, "be at least 0", getattr(recipe, name))
    return recipe


def read_filter_recipe(path: str | Path, overrides: Sequence[str] = (), preset: str = "") -> FilterRecipe:
    """The checked recipe in a YAML file over a preset's, changed by overrides such as "quality.min_luma=0.1".

    Paths of sources are relative to the working directory.

    Args:
        path: with a preset, a source is enough: a folder or a table instead of the YAML file.
        preset: a name in `PRESETS`; empty: none.

    Raises:
        RecipeError: a sentence about the field that is unknown, of a wrong type or out of its limits.
    """
    if preset and preset not in PRESETS:
        raise RecipeError(f"recipe: the preset must be of {', '.join(PRESETS)}, got {preset!r}")
    if preset and Path(path).suffix.lower() not in (".yaml", ".yml", ".json"):
        tree = overridden({"sources": [{"path": str(path)}]}, overrides)
    else:
        tree = read_tree(path, overrides)
    if preset and isinstance(tree, dict):
        tree = merged(PRESETS[preset], tree, FilterRecipe)
    recipe = convert(tree, FilterRecipe, "")
    validate(recipe)
    return recipe


def preset_recipe(preset: str) -> FilterRecipe:
    """What a recipe starts from: the defaults, under those of a preset where there is one."""
    return convert(PRESETS.get(preset, {}), FilterRecipe, "")


def validate(recipe: FilterRecipe) -> None:
    """RecipeError for what can be known before anything is read."""
    balance = recipe.balance
    _check_sources(recipe.sources)
    _must(bool(recipe.stages) and set(recipe.stages) <= set(range(1, 8)), "stages", "be of 1 to 7", recipe.stages)
    for name in recipe.without:
        _must(name in FILTER_NAMES, "without", f"be of {', '.join(FILTER_NAMES)}", name)
    _must("broken_file" not in recipe.without, "without", "leave broken_file in", recipe.without)
    _must(1 in recipe.stages, "stages", "have 1, which finds what cannot be decoded", recipe.stages)
    _must(0 <= recipe.curation.duplicate_bits <= LARGEST_DISTANCE, "curation.duplicate_bits",
          f"be 0 to {LARGEST_DISTANCE}", recipe.curation.duplicate_bits)  # fmt: skip
    sets = recipe.captions.sets
    for kind in sets:
        _must(kind in CAPTION_SETS, "captions.sets", f"be of {', '.join(CAPTION_SETS)}", kind)
    fine = not sets or (all(0 <= share < float("inf") for share in sets.values()) and sum(sets.values()) > 0)
    _must(fine, "captions.sets", "have shares of 0 or more, one above 0", sets)
    _must(not sets or 3 in recipe.stages, "captions.sets", "be empty without stage 3, whose they are", sets)
    for category, share in balance.categories.items():
        _must(category in CATEGORIES, "balance.categories", f"be of {', '.join(CATEGORIES)}", category)
        _must(share > 0, "balance.categories", "have shares above 0", share)
    _must(0 <= balance.power <= 1, "balance.power", "be in [0, 1]", balance.power)
    _must(balance.best_by in FILTER_NAMES, "balance.best_by", f"be of {', '.join(FILTER_NAMES)}", balance.best_by)
    for name, value in (("balance.tail", balance.tail), ("shard_records", recipe.shard_records)):
        _must(value >= 1, name, "be at least 1", value)
    for name in ("cpus", "gpus"):
        _must(getattr(recipe.ray, name) >= 0, f"ray.{name}", "be at least 0", getattr(recipe.ray, name))
    _must(recipe.sheet >= 0, "sheet", "be at least 0", recipe.sheet)


def _check_sources(sources: list[SourceRecipe]) -> None:
    _must(bool(sources), "sources", "name at least one path", sources)
    for source in sources:
        _must(bool(source.path), "sources", "have a path each", source)
        _must(source.category in ("", *CATEGORIES), "category", f"be of {', '.join(CATEGORIES)}", source.category)


def _must(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise RecipeError(f"recipe: {name} must {rule}, got {value!r}")

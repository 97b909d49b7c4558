"""Recipes of one strategy and what tests of synthesised data share."""

import pytest

pytest.importorskip("fontTools", reason="glyph coverage is read by fontTools")

from qwen_image_fast.training.synthesis import FontError, SynthesisRecipe, tiny
from qwen_image_fast.training.synthesis.recipe import STRATEGIES


def _has_chinese() -> bool:
    try:
        return bool(tiny(64, ("zh",)).faces("zh"))
    except FontError:
        return False


needs_chinese = pytest.mark.skipif(not _has_chinese(), reason="no Chinese font: install Debian's fonts-wqy-microhei")
languages = pytest.mark.parametrize("language", ["en", pytest.param("zh", marks=needs_chinese)])


def only(strategy: str, **changes) -> SynthesisRecipe:
    values = {name: float(name == strategy) for name in STRATEGIES} | {"sizes": ((160, 160),)} | changes
    return SynthesisRecipe(**values)


def mixed(language: str) -> SynthesisRecipe:
    return only(
        "pure", shapes=0.5, compositional=1.0, complex=1.0, languages=(language,), sizes=((160, 160), (192, 144))
    )

"""Synthesis of text-rendering data: pictures whose text is known, with captions, and editing pairs.

The report's three strategies (arXiv 2508.02324, section 3.4) in `pure`, `compositional` and `complex`; coloured shapes
for the stage before text in `shapes`; pairs in `editing`; scenes whose depth is known, and tasks of vision, in `scenes`
and `vision`. A `SynthesisRecipe` says what to make; `make` and `make_edit` are pure functions of (recipe, seed, index);
`stream` runs them on many processes.
"""

from .editing import make_edit
from .fonts import FontError, find_fonts
from .generator import make, stream
from .preview import contact_sheet, write_preview
from .recipe import SynthesisRecipe, tiny
from .sample import EditSample, Sample, quoted_texts
from .words import is_held_out

__all__ = [
    "EditSample",
    "FontError",
    "Sample",
    "SynthesisRecipe",
    "contact_sheet",
    "find_fonts",
    "is_held_out",
    "make",
    "make_edit",
    "quoted_texts",
    "stream",
    "tiny",
    "write_preview",
]

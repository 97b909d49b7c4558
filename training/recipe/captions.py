"""What is made of the captions of a source's pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_fast.training.recipe.fields import must, must_be_at_least

PLACE = "[trigger]"


@dataclass
class CaptionsRecipe:
    """trigger: a word of your own that stands for what is learnt: in the place of "[trigger]" in a caption, else
    before it, and alone for a picture that has none. default: the caption of pictures that have none.

    weights: of the kinds of captions to draw from (raw, recaption, fused, or the keys of `captions` in a table); a
    picture that lacks the kind drawn gives its best one. Empty: a picture with a list of captions gives each in
    proportion to its weight, any other its best one. lines: each line of a caption is a caption of its own.

    separator: between the parts of a caption, as tags have them. shuffle: put the parts in another order each time.
    drop: share of the parts that is left out. keep: so many parts at the start stay as they are. The trigger is none.
    """

    trigger: str = ""
    default: str = ""
    weights: dict[str, float] = field(default_factory=dict)
    lines: bool = False
    separator: str = ","
    shuffle: bool = False
    drop: float = 0.0
    keep: int = 0

    def check(self) -> None:
        must(bool(self.separator.strip()), "data.captions.separator", "hold more than white space", self.separator)
        must(0 <= self.drop < 1, "data.captions.drop", "be in [0, 1)", self.drop)
        must_be_at_least(0, "data.captions.keep", self.keep)
        ok = not self.weights or (min(self.weights.values()) >= 0 and sum(self.weights.values()) > 0)
        must(ok, "data.captions.weights", "be at least 0, one above 0", self.weights)
        used = self.shuffle or self.drop > 0
        must(used or not self.keep, "data.captions.keep", "be 0 without shuffle and drop: it has no effect", self.keep)

"""Whether an edit was done, by pixels: true of every rendering of its target, and not where another thing was done."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fontTools", reason="glyph coverage is read by fontTools")

from qwen_image_fast.training.evaluation.edit_checks import alike, as_placed, grown, seen_done
from qwen_image_fast.training.evaluation.evaluate_edit import EditResult, summary, table
from qwen_image_fast.training.evaluation.text_metrics import score
from qwen_image_fast.training.evaluation.tiny_eval import edit_fault
from qwen_image_fast.training.synthesis.colours import COLOURS
from qwen_image_fast.training.synthesis.editing import make_edit
from qwen_image_fast.training.synthesis.recipe import tiny

KINDS = ("colour", "ground", "add", "remove", "move", "reconstruct")


def pairs(kind, count=12, **changes):
    recipe = tiny(128, max_lines=1, edits=(kind,), **changes)
    return [make_edit(recipe, 1, index) for index in range(count)]


def softened(image):
    """A light blur, as a VAE leaves it."""
    padded = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    near = sum(padded[y : y + height, x : x + width] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)))
    return ((4.0 * image + near) / 8).round().astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["pure", "shapes"])
def test_the_target_is_done_and_the_source_is_not(kind, strategy):
    weights = {"pure": float(strategy == "pure"), "shapes": float(strategy == "shapes")}
    for pair in pairs(kind, **weights):
        assert seen_done(pair, pair.target) is True
        assert seen_done(pair, softened(pair.target)) is True
        assert seen_done(pair, pair.source) is (kind == "reconstruct")


@pytest.mark.parametrize("kind", ["colour", "add", "move", "remove"])
def test_something_else_is_not_done(kind):
    """The change painted in the ground's inverse: something is there, in another colour."""
    for pair in pairs(kind, 6, shapes=1.0, pure=0.0):
        other = pair.target.copy()
        other[pair.mask] = 255 - pair.target[0, 0]
        assert seen_done(pair, other) is False


def test_a_circle_is_no_square():
    y, x = np.mgrid[:64, :64]
    circle, square = (x - 32) ** 2 + (y - 32) ** 2 <= 15**2, (abs(x - 32) <= 15) & (abs(y - 32) <= 15)
    larger = (x - 32) ** 2 + (y - 32) ** 2 <= 15.5**2
    assert alike(circle, larger) and not alike(circle, square) and not alike(square, circle)
    assert not alike(circle, np.zeros_like(circle)) and not alike(np.zeros_like(circle), circle)
    assert not alike(np.roll(circle, 6, axis=1), circle)


def test_grown():
    point = np.zeros((5, 5), bool)
    point[2, 2] = True
    assert grown(point, 1).sum() == 9 and grown(point, 2).all()


def result(pair, seen, read, outside=40.0):
    return EditResult(pair, pair.target, read, score(pair.target_lines, read, "en"), outside, 40.0, seen)


def test_done_needs_what_is_seen_what_is_read_and_the_rest_untouched():
    (text,), (ground,), (colour,) = pairs("text", 1), pairs("ground", 1), pairs("colour", 1)
    right = text.target_lines
    assert result(text, None, right).done is True
    assert result(text, None, ("nonsense",)).done is False
    assert result(text, None, right, outside=20.0).done is False
    assert result(ground, True, ground.target_lines, outside=float("nan")).done is True  # all of it may change
    assert result(ground, True, ("nonsense",)).done is False
    assert result(colour, True, ("nonsense",)).done is True  # another question: the text's own rate says it
    assert result(colour, False, colour.target_lines).done is False
    photo = dataclasses.replace(colour, strategy="compositional")
    assert seen_done(photo, photo.target) is None and result(photo, None, ()).done is None


def test_the_summary_counts_what_was_done():
    (colour,), (text,) = pairs("colour", 1), pairs("text", 1)
    made = [result(colour, True, ()), result(colour, False, colour.target_lines), result(text, None, text.target_lines)]
    totals = summary(made)
    assert totals["colour"]["done"] == 0.5 and totals["colour"]["text_exact"] == 0.5 and totals["text"]["done"] == 1.0
    assert "| colour | 2 | 50.0% | 50.0% | 40.0 dB |" in table(totals)


def moved_thing(pair, across, down, scale=1.0):
    """The source with the added thing elsewhere, in another size."""
    rows, columns = np.nonzero(pair.mask)
    thing = Image.fromarray(pair.target[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    thing = thing.resize([round(scale * side) for side in thing.size], Image.Resampling.BICUBIC)
    picture = Image.fromarray(pair.source)
    middle = (columns.min() + columns.max() + 1) // 2 + across, (rows.min() + rows.max() + 1) // 2 + down
    picture.paste(thing, (middle[0] - thing.width // 2, middle[1] - thing.height // 2))
    return np.asarray(picture)


def added(shape):
    found = pairs("add", 40, max_letters=4, shapes=float(shape), pure=float(not shape))
    return [pair for pair in found if shape or len(pair.target_lines) > len(pair.source_lines)]


@pytest.mark.parametrize("shape", [True, False])
def test_what_is_added_may_stand_anywhere_in_its_place(shape):
    judged = 0
    for pair in added(shape):
        assert edit_fault(pair, pair.target) is None
        rows = np.flatnonzero(pair.mask.any(1))
        middle = (rows[0] + rows[-1] + 1) / 2
        if middle < 40 and rows[0] >= 6:  # in the upper row, with room above; nothing else is there
            near, far = moved_thing(pair, 0, -5), moved_thing(pair, 0, 60)
            judged += 1
            assert edit_fault(pair, near) is None and edit_fault(pair, softened(near)) is None, pair.instruction
            assert seen_done(as_placed(pair, far), far) is False, pair.instruction
    assert judged >= 5


def test_an_added_shape_may_have_another_size_and_no_other_form():
    for pair in added(True):
        small, tiny_one = moved_thing(pair, 0, 0, 0.75), moved_thing(pair, 0, 0, 0.4)
        assert edit_fault(pair, small) is None, pair.instruction
        assert edit_fault(pair, tiny_one), pair.instruction
        box = as_placed(pair, small).mask
        other = small.copy()
        other[box] = pair.source[0, 0]
        rows, columns = np.nonzero(box)
        strip = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.min() + (np.ptp(columns) + 1) // 3)
        other[strip] = COLOURS[colour_of(pair)].rgb
        assert edit_fault(pair, other), pair.instruction


def colour_of(pair):
    return next(word for word in pair.instruction.split() if word in COLOURS)


def test_other_kinds_are_judged_where_they_are():
    for kind in ("move", "colour", "remove"):
        (pair,) = pairs(kind, 1)
        assert as_placed(pair, pair.target) is pair

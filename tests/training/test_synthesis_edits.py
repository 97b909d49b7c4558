"""Synthesised pairs for editing: the instruction says what differs, and nothing differs elsewhere."""

import numpy as np
import pytest
from synthesis_helpers import languages, mixed, needs_chinese, only

from qwen_image_fast.training.evaluation.things import things
from qwen_image_fast.training.synthesis import make, make_edit, quoted_texts, tiny
from qwen_image_fast.training.synthesis.recipe import EDITS, STRATEGIES, VISION
from qwen_image_fast.training.synthesis.sample import reading_order

pytestmark = pytest.mark.usefixtures("one_photograph")


def test_pairs_depend_on_seed_and_index_only():
    recipe = mixed("en")
    for index in range(8):
        first, second = make_edit(recipe, 3, index), make_edit(recipe, 3, index)
        assert first.instruction == second.instruction and np.array_equal(first.target, second.target)


@languages
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pairs_differ_only_inside_the_mask(strategy, language):
    recipe = only(strategy, languages=(language,))
    kinds = set()
    for index in range(40):
        pair = make_edit(recipe, 0, index)
        kinds.add(pair.kind)
        changed = (pair.source != pair.target).any(-1)
        assert not (changed & ~pair.mask).any(), (index, pair.instruction)
        assert changed.any() != (pair.kind == "reconstruct"), (index, pair.instruction)
        assert pair.mask.any() != (pair.kind == "reconstruct")
        quoted = quoted_texts(pair.instruction)
        assert set(quoted) <= {*pair.source_lines, *pair.target_lines}
        if pair.kind == "text":
            *old, new = quoted
            if old:
                assert old[0] in pair.source_lines and old[0] not in pair.target_lines
            else:  # "change the text to": there is only one
                assert len(pair.source_lines) == 1
            assert new in pair.target_lines and new not in pair.source_lines
        elif pair.kind not in ("add", "remove"):
            assert pair.source_lines == pair.target_lines
    expected = {
        "shapes": {"colour", "ground", "add", "remove", "move", "reconstruct"},
        "pure": {"text", "colour", "ground", "add", "remove", "move", "reconstruct"},
        "scenes": set(VISION),
    }
    assert kinds == expected.get(strategy, {"text", "colour", "reconstruct"})


def test_kinds_of_edits_are_chosen_by_the_recipe():
    recipe = only("pure", edits=("text", "text", "colour"))
    kinds = [make_edit(recipe, 0, index).kind for index in range(60)]
    assert set(kinds) == {"text", "colour"} and kinds.count("text") > kinds.count("colour")
    with pytest.raises(ValueError, match="edits must be of"):
        only("pure", edits=("txt",))
    with pytest.raises(ValueError, match="edits must not be text alone"):
        only("shapes", edits=("text",))


@needs_chinese
def test_edits_have_languages_of_their_own():
    recipe = tiny(64, ("en", "en", "zh"), edit_languages=("en",))
    made = [make(recipe, 0, index).language for index in range(60)]
    assert 0 < made.count("zh") < made.count("en")
    assert {make_edit(recipe, 0, index).language for index in range(20)} == {"en"}
    with pytest.raises(ValueError, match="edit_languages must be en, zh, both or empty"):
        tiny(64, edit_languages=("fr",))


@pytest.mark.parametrize("rows", [16, 0])
def test_elements_of_pairs_stand_on_rows(rows):
    recipe = tiny(128, edits=("text",), max_lines=1, rows=rows)
    changed = [np.flatnonzero(make_edit(recipe, 0, index).mask.any(1)) for index in range(30)]
    middles = np.array([(lines[0] + lines[-1] + 1) / 2 for lines in changed])
    assert (abs(middles / 16 - np.round(middles / 16)).max() < 0.1) == bool(rows)


@pytest.mark.parametrize("size", [32, 64])
def test_tiny_pairs(size):
    pairs = [make_edit(tiny(size), 0, index) for index in range(40)]
    assert {pair.kind for pair in pairs} >= {"text", "colour", "ground", "add", "remove", "reconstruct"}


def test_boxes_are_read_by_rows():
    low, right, left, top = (10, 60, 40, 80), (70, 33, 90, 49), (5, 30, 60, 50), (50, 2, 90, 20)
    assert reading_order([low, right, left, top]) == [3, 2, 1, 0] and reading_order([]) == []


def in_pictures(**changes):
    return tiny(128, max_lines=1, edits_of_pictures=1.0, **{"edits": ("add", "move"), **changes})


def stands_at(box, place, before=None):
    """Whether a box of a picture of 128 pixels is where a row and a column of nine are; what was elsewhere before keeps
    what a single word does not say."""
    signs = {"left": -1, "right": 1, "top": -1, "bottom": 1, "center": 0}
    wanted = [None, None]
    for word in place.split():
        wanted[word in ("top", "bottom")] = signs[word]
    for axis, sign in enumerate(wanted):
        at, was = ((one[axis] + one[axis + 2]) / 2 if one else 64 for one in (box, before))
        if sign is None or (place == "center" and axis == 0 and before is None):
            right = abs(at - was) <= 8
        else:
            right = abs(at - 64) <= 8 if sign == 0 else sign * (at - 64) > 5
        if not right:
            return False
    return True


def test_in_pictures_shapes_go_to_the_nine_places():
    places = set()
    for index in range(80):
        pair = make_edit(in_pictures(shapes=1.0, pure=0.0, arranged=0.5), 0, index)
        (new,) = set(things(pair.target)) - set(things(pair.source))
        (old,) = set(things(pair.source)) - set(things(pair.target)) or (None,)
        place = pair.instruction.rpartition(" the ")[2]
        places.add(place)
        assert stands_at(new.box, place, old and old.box), (index, pair.instruction, new)
        assert len(things(pair.target)) == len(things(pair.source)) + (pair.kind == "add")
    assert len(places) == 9


def test_in_pictures_texts_stand_in_the_middle_and_go_to_places():
    named = set()
    for index in range(60):
        pair = make_edit(in_pictures(edits=("move",)), 0, index)
        rows, columns = np.nonzero(pair.source != pair.source[0, 0])[:2]
        assert stands_at((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), "center")
        assert stands_at(pair.boxes[0], pair.instruction.rpartition(" the ")[2]), pair.instruction
        assert pair.source_lines == pair.target_lines
        named.add(pair.instruction.replace(pair.source_lines[0], "CAT").split(" to the ")[0])
    assert named == {'move the text "CAT"', 'move "CAT"', "move the text", "move it"}


@languages
def test_pairs_of_pictures_differ_only_inside_the_mask(language):
    recipe = in_pictures(shapes=1.0, arranged=0.5, languages=(language,), edits=EDITS)
    kinds = set()
    for index in range(60):
        pair = make_edit(recipe, 0, index)
        kinds.add(pair.kind)
        changed = (pair.source != pair.target).any(-1)
        assert not (changed & ~pair.mask).any() and changed.any() != (pair.kind == "reconstruct"), pair.instruction
        assert set(quoted_texts(pair.instruction)) <= {*pair.source_lines, *pair.target_lines}
    assert kinds == set(EDITS)

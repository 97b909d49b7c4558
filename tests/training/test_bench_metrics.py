"""The benchmarks' metrics against values computed by hand."""

import math

import pytest
from bench_helpers import picture
from PIL import Image

from qwen_image_fast.training.evaluation.bench import metrics, reading
from qwen_image_fast.training.evaluation.bench.detections import fault, relations


def test_what_depends_on_a_no_is_no():
    """1 yes, 2 no, so 3 (on 1, 2) is no, and 4 (on 3) too where what became no counts; 5 is alone: 2 or 3 of 5."""
    answers = {1: True, 2: False, 3: True, 4: True, 5: True}
    parents = {1: [0], 2: [1], 3: [1, 2], 4: [3], 5: [0]}
    assert metrics.with_dependencies(answers, parents) == 2 / 5
    assert metrics.with_dependencies(answers, parents, once=True) == 3 / 5
    # In the order of the file: a child before its parent is judged by what the parent was then.
    assert metrics.with_dependencies({1: True, 2: False, 3: True}, {1: [3], 3: [2], 2: [0]}) == 1 / 3
    assert metrics.with_dependencies({1: True}, {1: [0]}) == 1
    with pytest.raises(ValueError, match="must not be empty"):
        metrics.with_dependencies({}, {})


def test_a_grid_is_cut_row_by_row():
    grid = Image.new("RGB", (8, 4))
    for i, colour in enumerate(("red", "green", "blue", "white")):
        grid.paste(picture(colour, (4, 2)), (i % 2 * 4, i // 2 * 2))
    parts = metrics.crops(grid)
    assert [part.size for part in parts] == [(4, 2)] * 4
    assert [part.getpixel((0, 0)) for part in parts] == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]
    with pytest.raises(ValueError, match="divisible by 2 each way, got 5 x 4"):
        metrics.crops(Image.new("RGB", (5, 4)))


def test_soft_tifa():
    assert metrics.soft_tifa([1.0, 1.0, 0.25, 0.25]) == (0.625, 0.5)
    assert metrics.soft_tifa([1.0, 0.0]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [("Four.", "four", True), ("4", "four", True), ("Yes, they are", "Yes", False), ("yes", "Yes", True),
     ("three", "four", False), ("a dog", "Dog", True), ("11", "11", True)],
)  # fmt: skip
def test_short_answers(given, wanted, same):
    assert metrics.same_answer(given, wanted) is same


def test_viescore_takes_the_least_and_the_root():
    assert metrics.viescore([9, 4], [9, 10]) == (4, 9, 6.0)
    assert metrics.viescore([0, 10], [10, 10]) == (0, 10, 0.0)
    assert metrics.viescore([8, 8], [2, 5])[2] == 4.0


def test_multiset_match():
    assert metrics.multiset_match("To be, or not to be", "be to; TO go", "en") == (3, 6)
    assert metrics.multiset_match("你好，你好 A1", "你好A", "zh") == (3, 6)
    assert metrics.multiset_match("one two", "", "en") == (0, 2)


def test_oneig_text():
    """ "Big SALE" read as "big sole": one letter of eight, one word of two; with "x" right: ED 1/2, CR 1/2, WAC 2/3."""
    rows = [metrics.oneig_text("Big SALE!", "big sole", "en"), metrics.oneig_text("x", "X", "en")]
    assert rows == [(1, False, 1, 2), (0, True, 1, 1)]
    assert metrics.oneig_text_score(rows, "en") == 1 - 0.5 * 0.5 * (1 / 3) / 100
    nothing = [metrics.oneig_text("你" * 80, "", "zh")]
    assert nothing == [(80, False, 0, 80)] and metrics.oneig_text_score(nothing, "zh") == 0  # 80 counts as 50


def thing(name, box, score=0.95, **more):
    return {"class": name, "box": box, "score": score, **more}


class TestGenEval:
    DOG, CAT = thing("dog", [0, 0, 10, 10]), thing("cat", [30, 0, 40, 10])

    def test_objects_and_confidence(self):
        wanted = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
        assert fault(wanted, [self.DOG, self.CAT]) is None
        assert fault(wanted, [self.DOG]) == "0 of 1 cat"
        assert fault(wanted, [self.DOG, {**self.CAT, "score": 0.3}]) == "0 of 1 cat"

    def test_counting_needs_more_confidence_and_no_more_objects(self):
        wanted = {"tag": "counting", "include": [{"class": "cup", "count": 2}],
                  "exclude": [{"class": "cup", "count": 3}]}  # fmt: skip
        cups = [thing("cup", [20 * i, 0, 20 * i + 10, 10]) for i in range(3)]
        assert fault(wanted, cups[:2]) is None
        assert fault(wanted, cups) == "3 or more cup"
        assert fault(wanted, [cups[0], {**cups[1], "score": 0.85}]) == "1 of 2 cup"

    def test_colours(self):
        wanted = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
        assert fault(wanted, [{**self.DOG, "color": "red"}]) is None
        assert fault(wanted, [{**self.DOG, "color": "blue"}]) == fault(wanted, [self.DOG]) == "0 of 1 dog red"
        # Only the surest is looked at.
        assert fault(wanted, [{**self.DOG, "color": "blue"}, {**self.DOG, "color": "red", "score": 0.5}])

    def test_places(self):
        wanted = {"tag": "position", "include": [{"class": "dog", "count": 1},
                  {"class": "cat", "count": 1, "position": ["right of", 0]}]}  # fmt: skip
        assert fault(wanted, [self.DOG, self.CAT]) is None
        assert (
            fault(wanted, [self.CAT | {"class": "dog"}, self.DOG | {"class": "cat"}]) == "cat is not right of the other"
        )
        assert fault(wanted, [self.CAT]) == "0 of 1 dog; no other for right of"

    def test_a_place_is_a_way_of_more_than_a_tenth_of_the_sizes(self):
        """Ten wide each: of a way of 4, 2 are left, which is half; of 3 along and 2 down 1 of sqrt 13; of 6 and 2, 4 of
        sqrt 40."""
        one = thing("a", [0, 0, 10, 10])
        assert relations(one, one) == relations(one, thing("b", [4, 0, 14, 10])) == set()
        assert relations(one, thing("b", [5, 0, 15, 10])) == {"left of"}
        assert relations(one, thing("b", [3, 2, 13, 12])) == set()
        assert relations(one, thing("b", [6, 2, 16, 12])) == {"left of"}
        assert relations(one, thing("b", [-20, -20, -10, -10])) == {"right of", "below"}


class TestAnswers:
    def test_yes_or_no(self):
        assert [reading.yes_or_no(t) for t in ("Yes.", "no", "**Yes**, it is", " NO, because")] == [
            True,
            False,
            True,
            False,
        ]
        for nonsense in ("", "maybe", "I say yes", "yesterday", "nothing"):
            with pytest.raises(ValueError, match="must begin with yes or no"):
                reading.yes_or_no(nonsense)

    def test_lines_must_be_as_many(self):
        assert reading.yes_or_no_lines(3)("1. Yes\n2) no, as\n- yes") == [True, False, True]
        for nonsense in ("yes\nno", "yes\nno\nyes\nyes", "Yes no yes"):
            with pytest.raises(ValueError, match="must have 3 lines"):
                reading.yes_or_no_lines(3)(nonsense)

    def test_scores_in_json(self):
        read = reading.scores(2, 0, 10)
        assert read('```json\n{"reason": "it {is} so", "score": [8, 7.5]}\n```') == [8.0, 7.5]
        for nonsense in ("8, 7", "{}", '{"score": [8]}', '{"score": [8, 11]}', '{"score": [8, true]}',
                         '{"score": [8, NaN]}', "{" * 100_000 + "}"):  # fmt: skip
            with pytest.raises(ValueError):
                read(nonsense)

    def test_score_lines(self):
        read = reading.score_lines(3, 1, 5)
        assert read("First: 5\nSecond: 4/5\n**Third: 3**") == [5, 4, 3]
        for nonsense in ("First: 5\nSecond: 4", "a: 6\nb: 1\nc: 1", "5\n4\n3"):
            with pytest.raises(ValueError, match="must have 3 lines"):
                read(nonsense)

    def test_objects(self):
        assert reading.objects('Here: [{"class": "dog", "score": 1, "box": [0, 0, 1, 1]}]')[0]["class"] == "dog"
        assert reading.objects("[]") == []
        for nonsense in ("none", "[1]", '[{"class": "dog", "score": 1, "box": [0, 0, 1]}]',
                         '[{"class": 1, "score": 1, "box": [0, 0, 1, 1]}]'):  # fmt: skip
            with pytest.raises(ValueError):
                reading.objects(nonsense)

    def test_text(self):
        assert reading.read_text(" NONE. ") == "" and reading.read_text("NONE left\n") == "NONE left"
        assert reading.short("\n four \nbecause") == "four"
        with pytest.raises(ValueError, match="must not be empty"):
            reading.short(" \n")


def test_means_are_of_something():
    assert math.isclose(metrics.mean([1, 2, 4]), 7 / 3)
    with pytest.raises(ValueError, match="must not be empty"):
        metrics.mean([])

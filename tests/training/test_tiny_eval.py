"""TinyEval's checks: true of every right picture, also softened as a VAE leaves it, and of no wrong one."""

import json

import numpy as np
import pytest

pytest.importorskip("fontTools", reason="glyph coverage is read by fontTools")

from qwen_image_fast.training.evaluation import tiny_eval
from qwen_image_fast.training.evaluation.edit_checks import ink
from qwen_image_fast.training.evaluation.glyphs import font_size, read_at
from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.things import components, fault, likeness, stands, things
from qwen_image_fast.training.evaluation.tiny_cases import PICTURES, digest, edits, pictures, recipe
from qwen_image_fast.training.evaluation.tiny_eval import edit_fault, picture_fault
from qwen_image_fast.training.synthesis.canvas import Ground, Scene, ShapeElement, TextElement, render_scene
from qwen_image_fast.training.synthesis.colours import COLOURS
from qwen_image_fast.training.synthesis.recipe import EDITS
from qwen_image_fast.training.synthesis.words import is_held_out

COUNT = 12
ASKED = {task: pictures(task, COUNT) for task in PICTURES}


def softened(image):
    """A light blur, as a VAE leaves it."""
    padded = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    near = sum(padded[y : y + height, x : x + width] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)))
    return ((4.0 * image + near) / 8).round().astype(np.uint8)


def scene(ground, *elements):
    return render_scene(Scene((128, 128), Ground(ground), tuple(ShapeElement(*e) for e in elements)))


def test_the_prompts_are_fixed():
    """Another hash means that results of before cannot be compared: say so in docs/evaluation.md and CHANGELOG.md."""
    asked = [one for task in PICTURES for one in pictures(task, 50)]
    pairs = [pair for kind in EDITS for pair in edits(kind, 50)]
    assert len(asked) == len({one.prompt for one in asked}) == 250 and len(pairs) == 350
    assert digest(asked, pairs) == "1816576e674d3eaa"
    assert digest(asked, pairs[1:]) != digest(asked, pairs)


def test_the_words_are_held_out():
    assert all(is_held_out(one.text) for one in ASKED["text"])
    assert all(is_held_out(text) for kind in EDITS for pair in edits(kind, 5) for text in pair.target_lines)


@pytest.mark.parametrize("task", PICTURES)
def test_a_right_picture_is_right(task):
    for one in ASKED[task]:
        assert picture_fault(one, one.right) is None, one.prompt
        assert picture_fault(one, softened(one.right)) is None, one.prompt


@pytest.mark.parametrize("task", PICTURES)
def test_the_picture_of_another_prompt_is_wrong(task):
    for one, other in zip(ASKED[task], ASKED[task][1:]):
        assert picture_fault(one, other.right), f"{one.prompt} / {other.prompt}"


@pytest.mark.parametrize("task", PICTURES)
def test_an_empty_ground_is_wrong(task):
    for one in ASKED[task]:
        plain = np.broadcast_to(one.right[0, 0], one.right.shape)
        assert picture_fault(one, np.ascontiguousarray(plain))


def test_things_are_named_and_placed():
    image = scene("white", ("star", "red", 30, 40, 44), ("circle", "blue", 90, 80, 40), ("square", "green", 92, 24, 30))
    seen = things(image)
    assert [t.name for t in seen] == ["red star", "blue circle", "green square"]
    assert np.allclose(seen[1].centre, (90, 80), atol=1)
    assert things(scene("pink")) == []


def test_likeness():
    """1 for what is wanted, wherever it stands; less for another outline, colour or number, and never above 1."""
    star, circle = ("star", "red", 30, 40, 44), ("circle", "blue", 90, 80, 40)
    both, wanted = scene("white", star, circle), [("star", "red"), ("circle", "blue")]
    assert likeness(both, wanted) == likeness(both, wanted[::-1]) > 0.9
    assert likeness(scene("white", circle, ("star", "red", 90, 30, 44)), wanted) > 0.9
    for fewer in (likeness(both, wanted[:1]), likeness(scene("white", star), wanted)):  # one too many, one too few
        assert 0.43 < fewer <= 0.5
    assert 0.43 < likeness(scene("white", star, ("circle", "green", 90, 80, 40)), wanted) <= 0.5
    square = likeness(scene("white", ("square", "blue", 90, 80, 40)), [("circle", "blue")])
    assert 0.75 < square < 0.85  # a circle has 0.79 of its square
    assert likeness(scene("white"), wanted) == 0
    for task in ("single", "two", "counting", "position"):
        assert all(likeness(one.right, one.things) > 0.85 for one in ASKED[task])


def test_what_is_wrong_is_said():
    image = scene("white", ("star", "red", 32, 64, 50), ("circle", "blue", 96, 64, 50))
    wanted = [("star", "red"), ("circle", "blue")]
    assert fault(image, wanted, "white", "left of") is None
    assert fault(image, wanted[::-1], "white", "right of") is None
    assert fault(image, wanted, "black") == "the ground is white"
    assert fault(image, wanted, "white", "above") == "the red star is not above the blue circle"
    # Colours bound to the wrong shape; one too few; one too many.
    shown = "shows a red star, a blue circle"
    assert fault(image, [("star", "blue"), ("circle", "red")], "white") == shown
    assert fault(image, [*wanted, ("circle", "blue")], "white") == fault(image, wanted[:1], "white") == shown
    assert fault(scene("white"), wanted, "white") == "shows nothing"


def test_a_blob_is_no_shape():
    image = scene("white", ("star", "red", 64, 64, 60))
    image = image.copy()
    image[30:95, 60:68] = (222, 32, 36)
    image[20:110, 100:104] = (222, 32, 36)
    assert [t.shape for t in things(image)] == [None, None]
    assert "a red something" in fault(image, [("star", "red")], "white")


def test_small_spots_are_no_things():
    mask = np.zeros((20, 20), bool)
    mask[:6, :6] = mask[8:15, 8:15] = True
    mask[6, 6] = mask[7, 7] = True  # corners hold together
    assert [int(part.sum()) for part in components(mask)] == [36 + 49 + 2]
    mask[6, 6] = False
    assert sorted(int(part.sum()) for part in components(mask)) == [50]


@pytest.mark.parametrize(
    ("x", "y", "relations"),
    [(20, 64, {"left of"}), (108, 64, {"right of"}), (64, 16, {"above"}), (64, 112, {"below"}),
     (20, 20, {"left of", "above"}), (64, 64, set()), (61, 64, set()), (20, 50, {"left of"})],
)  # fmt: skip
def test_places(x, y, relations):
    """A thing nearer than a tenth of both sizes stands nowhere; on the diagonal both are true."""
    (middle,) = things(scene("white", ("square", "blue", 64, 64, 20)))
    (other,) = things(scene("white", ("square", "red", x, y, 20)))
    assert {r for r in ("left of", "right of", "above", "below") if stands(other, middle, r)} == relations


class TestLetters:
    FACE = recipe().faces("en")[0]

    def read(self, one, image, text=None):
        return read_at(image, one.right, one.box, text or one.text, self.FACE)

    def test_all_texts_are_read(self):
        for one in ASKED["text"]:
            assert self.read(one, one.right) == one.text

    def test_a_text_a_little_away_is_read(self):
        for one in ASKED["text"][:6]:
            assert self.read(one, np.roll(one.right, (3, -2), (0, 1))) == one.text

    def test_one_letter_less_is_seen(self):
        """The last letter painted over."""
        for one in ASKED["text"]:
            image = one.right.copy()
            left, _, right, _ = one.box
            image[:, right - (right - left) // len(one.text) : right + 1] = image[0, 0]
            assert self.read(one, image) != one.text
            assert picture_fault(one, image).startswith(("reads", "shows no"))

    def test_what_is_there_is_read(self):
        """Another word of the same length, of letters that look alike."""
        one = next(o for o in pictures("text", 50) if "l" in o.text)
        left, top, right, bottom = one.box
        size = font_size(one.right, one.box, one.text, self.FACE)
        for other in (one.text.replace("l", letter) for letter in "I1i"):
            element = TextElement(
                other, (other,), self.FACE, size, one.colour, (left + right) // 2, (top + bottom) // 2
            )
            image = render_scene(Scene((128, 128), Ground(one.ground), (element,)))
            assert self.read(one, image) == other

    def test_another_box_and_other_characters_are_refused(self):
        one = ASKED["text"][0]
        with pytest.raises(ValueError, match="must be the ink of"):
            read_at(one.right, one.right, (0, 0, 3, 90), one.text, self.FACE)
        with pytest.raises(ValueError, match="must be of letters and digits, got '好'"):
            self.read(one, one.right, "好A")


def test_a_text_in_another_colour_and_a_spot_beside_it_are_wrong():
    for one in ASKED["text"][:6]:
        other = "green" if one.colour != "green" else "purple"
        painted = one.right.copy()
        painted[ink(painted)] = COLOURS[other].rgb
        assert picture_fault(one, painted) == f"the text is {other}"
        spotted = one.right.copy()
        spotted[4:24, 4:24] = 255 - spotted[0, 0]
        assert picture_fault(one, spotted) == "something stands beside the text"


@pytest.mark.parametrize("kind", EDITS)
def test_edits(kind):
    pairs = edits(kind, COUNT)
    for pair in pairs:
        assert edit_fault(pair, pair.target) is None, pair.instruction
        assert edit_fault(pair, softened(pair.target)) is None, pair.instruction
        assert (edit_fault(pair, pair.source) is None) is (kind == "reconstruct"), pair.instruction
        lost = np.ascontiguousarray(np.broadcast_to(pair.target[0, 0], pair.target.shape))
        if pair.target_lines:
            assert edit_fault(pair, lost), pair.instruction
    if kind != "ground":  # of which all may change
        pair = pairs[0]
        touched = pair.target.copy()
        touched[~pair.mask] = 255 - touched[~pair.mask]
        assert edit_fault(pair, touched)


def test_wilson():
    """Of 8 of 10 right: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10) with z = 1.96 is 0.4902 and 0.9433."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 50)[0] == 0.0 and wilson(0, 50)[1] == pytest.approx(1.9599640**2 / (50 + 1.9599640**2))
    assert wilson(50, 50) == pytest.approx((1 - wilson(0, 50)[1], 1.0))
    for right, of in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="wilson: right must be"):
            wilson(right, of)


def test_a_report_counts_and_shows_what_failed(tmp_path):
    asked = ASKED["single"][:4]
    drawn = [one.right for one in asked[:3]] + [asked[0].right]
    large = [np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in drawn]
    judged = list(tiny_eval.run_pictures(lambda part, first: large[first : first + len(part)], asked, batch=3))
    pairs = edits("move", 2)
    judged += tiny_eval.run_edits(lambda part, first: [pair.source for pair in part], pairs)
    judged += tiny_eval.run_vae(lambda part, first: [one.right for one in part], asked[:1])
    totals = tiny_eval.write_report(judged, tmp_path, "mine", {"steps": 1})
    assert [(task, v["right"], v["pictures"]) for task, v in totals.items()] == [
        ("single", 3, 4), ("edit move", 0, 2), ("vae", 1, 1),
    ]  # fmt: skip
    assert (totals["single"]["low"], totals["single"]["high"]) == wilson(3, 4)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["summary"] == totals and [p["fault"] is None for p in stored["pictures"]].count(True) == 4
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 3 and page.count("data:image/png;base64") == 1 + 2 * 2
    assert "single: 1 of 4 wrong" in page and asked[3].prompt in page

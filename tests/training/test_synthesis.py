"""Synthesised text-rendering data: what is drawn is what the caption says, and nothing else decides it."""

import dataclasses
import random
import string
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from synthesis_helpers import languages, mixed, needs_chinese, only
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.synthesis import (
    FontError,
    SynthesisRecipe,
    canvas,
    colours,
    compositional,
    fonts,
    generator,
    make,
    photos,
    preview,
    pure,
    quoted_texts,
    sample,
    shapes,
    stream,
    tiny,
    words,
    write_preview,
)
from qwen_image_fast.training.synthesis import complex as complex_layouts
from qwen_image_fast.training.synthesis.canvas import SHAPES

pytestmark = pytest.mark.usefixtures("one_photograph")
RENDERED = {"pure": pure, "compositional": compositional, "complex": complex_layouts}


def same(first, second) -> bool:
    return first.caption == second.caption and first.lines == second.lines and np.array_equal(first.image, second.image)


def squeezed(texts) -> str:
    return "".join("".join(texts).split())


# Determinism


@languages
def test_a_sample_depends_on_seed_and_index_only(language):
    recipe = mixed(language)
    forwards = [make(recipe, 7, index) for index in range(12)]
    canvas.text_mask.cache_clear()
    canvas._turned_mask.cache_clear()
    backwards = [make(SynthesisRecipe.from_dict(vars(recipe)), 7, index) for index in reversed(range(12))]
    assert all(same(a, b) for a, b in zip(forwards, reversed(backwards)))
    assert len({s.caption for s in forwards}) == 12
    assert not any(same(make(recipe, 8, index), forwards[index]) for index in range(12))


def test_processes_give_the_same_samples_in_order():
    recipe, count = tiny(32), generator._CHUNK + 3
    alone = list(stream(recipe, 1, start=5, count=count))
    parallel = list(stream(recipe, 1, start=5, count=count, workers=2))
    assert len(alone) == len(parallel) == count
    assert all(same(a, b) for a, b in zip(alone, parallel))
    assert same(alone[4], make(recipe, 1, 9))


def test_an_endless_stream_can_be_left():
    endless = stream(tiny(32), 0)
    assert same(next(endless), make(tiny(32), 0, 0))
    endless.close()


# What is drawn


@languages
@pytest.mark.parametrize("strategy", RENDERED)
def test_the_caption_quotes_what_was_drawn(monkeypatch, strategy, language):
    """Each quoted text, in order, is what Pillow was asked to draw, and nothing else was drawn."""
    recipe, module = only(strategy, languages=(language,)), RENDERED[strategy]
    drawn: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def recording(self, xy, text, *args, **kwargs):
        drawn.append(text)
        return draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recording)
    checked = 0
    for seed in range(40):
        planned = module.plan(recipe, random.Random(seed), (160, 160), language)
        if planned is None:
            assert module.make(recipe, random.Random(seed), (160, 160), language) is None
            continue
        made = module.make(recipe, random.Random(seed), (160, 160), language)
        canvas.text_mask.cache_clear()
        canvas._turned_mask.cache_clear()
        drawn.clear()
        picture = canvas.render_scene(planned) if strategy == "pure" else module.render(planned)[0]
        assert np.array_equal(picture, made.image)
        assert quoted_texts(made.caption) == made.lines
        assert squeezed(made.lines) == squeezed(drawn)
        checked += 1
    assert checked > 10


@languages
def test_text_stays_inside_the_canvas_and_its_box(language):
    """On a plain ground every pixel outside the boxes is the ground's colour, and the boxes are in the canvas."""
    recipe = only("pure", languages=(language,), textures=("plain",), sizes=((96, 96), (200, 80)))
    for index in range(40):
        made = make(recipe, 0, index)
        height, width, _ = made.image.shape
        outside = np.ones((height, width), bool)
        for left, top, right, bottom in made.boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            outside[top:bottom, left:right] = False
        assert (made.image[outside] == colours.COLOURS[made.colours["ground"]].rgb).all()
        assert (~outside).any() and (made.image[~outside] != colours.COLOURS[made.colours["ground"]].rgb).any()


@pytest.mark.parametrize("strategy", ["compositional", "complex"])
def test_boxes_of_other_strategies_are_inside(strategy):
    for index in range(15):
        made = make(only(strategy), 0, index)
        assert len(made.boxes) == len(made.lines) > 0
        assert all(0 <= b[0] < b[2] <= 160 and 0 <= b[1] < b[3] <= 160 for b in made.boxes)


@languages
def test_ink_can_be_read_on_its_ground(language):
    for index in range(40):
        made = make(tiny(64, (language,)), 2, index)
        inks = [name for role, name in made.colours.items() if role.startswith("text")]
        assert all(colours.contrast(ink, made.colours["ground"]) >= colours.LEAST_CONTRAST for ink in inks)


@pytest.mark.parametrize("size, letters", [(32, 3), (64, 6), (128, 8)])
def test_tiny_keeps_its_limits(size, letters):
    recipe = tiny(size)
    known = set(string.ascii_letters + string.digits)
    for index in range(60):
        made = make(recipe, 0, index)
        assert made.image.shape == (size, size, 3) and made.image.dtype == np.uint8
        assert len(made.lines) <= (1 if size == 32 else 2)
        assert all(len(line) <= letters and set(line) <= known for line in made.lines)


def test_fixed_captions_begin_with_the_text():
    made = [make(tiny(64, natural=0.0, max_lines=1), 0, index) for index in range(10)]
    for one in made:
        ground, ink = one.colours["ground"], one.colours["text"]
        assert one.caption == f'"{one.lines[0]}" in {ink} on a {ground} ground'


@needs_chinese
def test_chinese_captions():
    for index in range(10):
        made = make(tiny(64, ("zh",), natural=0.0, max_lines=1), 0, index)
        ink, ground = (colours.COLOURS[made.colours[role]].chinese for role in ("text", "ground"))
        assert made.caption == f"“{made.lines[0]}”{ink}，{ground}背景"
        assert set(made.lines[0]) <= set(words.HAN_CHARACTERS)


@pytest.mark.parametrize("natural", [0.0, 1.0])
@languages
def test_captions_in_the_other_language(language, natural):
    """The same pictures, told in the other language: the text as it is, colours and the rest translated."""
    recipe = tiny(64, (language,), natural=natural, max_lines=1)
    always = dataclasses.replace(recipe, other_captions=1.0)
    for index in range(8):
        made = make(always, 0, index)
        assert quoted_texts(made.caption) == made.lines
        assert told_in_chinese(made) == (language == "en")
    some = [make(dataclasses.replace(recipe, other_captions=0.5), 0, index) for index in range(24)]
    assert 4 <= sum(map(told_in_chinese, some)) <= 20


def told_in_chinese(sample):
    """Of the words around the text."""
    return any("\u4e00" <= c <= "\u9fff" for c in sample.caption.replace(sample.lines[0], ""))


def test_shapes():
    made = [make(tiny(64, shapes=1, pure=0), 0, index) for index in range(30)]
    assert any(one.caption.startswith(("a ", "an ")) and " and " not in one.caption for one in made)
    for one in made:
        assert not one.lines and one.caption.endswith(" ground")
        left, top, right, bottom = one.boxes[0]
        centre = one.image[(top + bottom) // 2, (left + right) // 2]
        assert tuple(centre) == colours.COLOURS[one.colours["shape 0"]].rgb


def test_kinds_that_occur_several_times():
    kinds = ["circle", "square", "triangle", *["star"] * 5]
    counts = dict.fromkeys(kinds, 0)
    for index in range(200):
        sample = make(tiny(64, shapes=1, pure=0, arranged=0.3, kinds=kinds), 0, index)
        for kind in counts:
            counts[kind] += kind in sample.caption
    others = [counts.pop("star"), *counts.values()]
    assert others[0] > 1.5 * max(others[1:]) and min(others) > 20
    plain = [make(tiny(64, shapes=1, pure=0, kinds=tuple(SHAPES)), 0, i).caption for i in range(9)]
    assert plain == [make(tiny(64, shapes=1, pure=0), 0, i).caption for i in range(9)]


def test_centred_shapes():
    """In the middle of the picture, of its halves or of its quarters (one above two), all of one size."""
    seen, sizes = {}, set()
    for index in range(120):
        one = make(tiny(128, shapes=1, pure=0, arranged=0.6), 0, index)
        centres = tuple(((l + r) // 2, (t + b) // 2) for l, t, r, b in one.boxes)
        seen.setdefault(len(one.boxes), set()).add(centres)
        extents = {r - l for l, t, r, b in one.boxes} | {b - t for l, t, r, b in one.boxes}
        assert len(extents) == 1
        sizes.add((len(one.boxes) > 1, *extents))
    sides = {((32, 64), (96, 64)), ((96, 64), (32, 64)), ((64, 32), (64, 96)), ((64, 96), (64, 32))}
    assert seen[1] == {((64, 64),)} and seen[2] == sides and seen[3] == {((64, 32), (32, 96), (96, 96))}
    assert seen[4] == {((32, 32), (96, 32), (32, 96), (96, 96))}
    assert sizes == {(False, 70), (False, 90), (True, 35), (True, 45)}


@languages
@pytest.mark.parametrize("centred", [True, False])
def test_arranged_shapes(language, centred):
    """As many as the caption says, or where it says, apart from each other."""
    for index in range(40):
        one = make(tiny(128, (language,), shapes=1, pure=0, arranged=1.0, centred=centred), 0, index)
        assert one.strategy == "shapes" and len(one.boxes) == len(one.colours) - 1
        for number, (left, top, right, bottom) in enumerate(one.boxes):
            assert 0 <= left < right <= 128 and 0 <= top < bottom <= 128
            middle = tuple(one.image[(top + bottom) // 2, (left + right) // 2])
            assert middle == colours.COLOURS[one.colours[f"shape {number}"]].rgb
            assert not any(left < r and l < right and top < b and t < bottom for l, t, r, b in one.boxes[:number]), (
                one.caption
            )
        of = "{}个" if language == "zh" else "{} "
        counted = [n for n, told in shapes.NUMBERS.items() if of.format(told[language == "zh"]) in one.caption]
        placed = [side for side, name in shapes.SIDES.items() if (name if language == "zh" else side) in one.caption]
        assert len(counted) + len(placed) == 1
        if counted:
            assert len(one.boxes) == counted[0]
        else:
            (a, b), axis = one.boxes, 0 if placed[0] in ("left of", "right of") else 1
            before = placed[0] in ("left of", "above")
            assert (a[axis + 2] <= b[axis]) if before else (b[axis + 2] <= a[axis])
    plain = [make(tiny(64, shapes=1, pure=0, arranged=0.0), 0, i).caption for i in range(9)]
    assert plain == [make(tiny(64, shapes=1, pure=0), 0, i).caption for i in range(9)]


@pytest.mark.parametrize("text", ['say "hi"', "it’s “this”", "plain", '"a" and “b”'])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_quotes_round_trip(text, language):
    assert quoted_texts(f"A sign: {sample.quote(text, language)} in red") == (text,)


# Missing glyphs


def test_a_paragraph_with_a_missing_glyph_is_dropped_whole():
    good, bad = "Every glyph is here.", "One glyph \U0001f9ff is not here."
    recipe = only("pure", paragraph=1.0, paragraphs=(good, bad), rotation=0.0)
    assert {make(recipe, 0, index).lines for index in range(12)} == {(good,)}
    alone = only("pure", paragraph=1.0, paragraphs=(bad,))
    assert all(pure.plan(alone, random.Random(i), (160, 160), "en") is None for i in range(5))
    with pytest.raises(
        ValueError, match=r"200 pure samples in en at 160 x 160 were dropped, because a glyph was missing"
    ):
        make(alone, 0, 0)


def test_coverage():
    face = fonts.find_fonts()[0]
    assert fonts.missing_glyphs(face, "ab \n") == ""
    assert fonts.missing_glyphs(face, "a你好你") == "你好"
    assert fonts.faces_for((face,), "a你") == ()


def test_a_language_without_a_font_says_what_to_do():
    dejavu = next(face for face in fonts.find_fonts() if not face.is_chinese)
    recipe = only("pure", languages=("zh",), fonts=(dejavu.path,), system_fonts=False)
    with pytest.raises(
        FontError, match="no font has the glyphs 的一是.*install a Chinese font, such as Debian.*give --fonts a folder"
    ):
        make(recipe, 0, 0)


def test_font_errors(tmp_path, monkeypatch):
    with pytest.raises(FontError, match=r"font file or folder .*/none does not exist"):
        fonts.find_fonts((str(tmp_path / "none"),))
    with pytest.raises(FontError, match="has no font: files must end in .ttf, .otf, .ttc"):
        fonts.find_fonts((str(tmp_path),))
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    with pytest.raises(FontError, match="broken.ttf cannot be read"):
        fonts.find_fonts((str(tmp_path),))
    with pytest.raises(FontError, match="no font was found: pip install matplotlib"):
        fonts.find_fonts(system=False)


# Photographs


def test_photographs_of_a_folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a noisy wall.\n")
    recipe = only("compositional", photos=str(tmp_path), natural=0.0)
    assert make(recipe, 0, 0).caption.endswith(" in front of a noisy wall")
    (tmp_path / "b.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match="photograph .*b.jpg cannot be read"):
        photos.open_photo(str(tmp_path / "b.jpg"))


def test_photographs_of_scikit_image():
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    found = photos.find_photos(None)
    assert len(found) > 3 and all(min(photos.open_photo(path).size) >= 250 for path, *_ in found)


def test_photograph_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="has no photographs: files must end in .png"):
        make(only("compositional", photos=str(tmp_path)), 0, 0)
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="give --photos a folder of your own, or pip install scikit-image"):
        photos.find_photos.__wrapped__(None)


# Recipes


@pytest.mark.parametrize(
    "values, message",
    [
        ({"pure": 0}, "one weight of shapes, pure, compositional, complex, scenes must be positive"),
        ({"pure": -1}, "pure must be 0 or more, got -1"),
        ({"sizes": ()}, "sizes must not be empty"),
        ({"complex": 1, "sizes": [[64, 64]]}, "sizes must be .* 128 pixels or more for pure and complex"),
        ({"languages": ["fr"]}, "languages must be en, zh or both"),
        ({"text_colours": ["mauve"]}, "text_colours must be of"),
        ({"textures": ["wood"]}, "textures must be of"),
        ({"text_colours": ["white"], "ground_colours": ["white"]}, "have one that can be read on white"),
        ({"split": "test"}, "split must be of train, held_out"),
        ({"split": "held_out", "max_letters": 1}, "max_letters must be 2 or more for the held_out split"),
        ({"fill": 0}, "fill must be in"),
        ({"han": "x"}, "han must be Chinese characters, each once"),
        ({"han_weights": {"的": 2}}, "han_weights must be empty without zh"),
        ({"languages": ("zh",), "han_weights": {"龘": 2}}, "han_weights must be of the characters of han"),
        ({"kinds": ["star"]}, "kinds must be each of .*, once or more often"),
        ({"rows": -1}, "rows must be 0 or more"),
        ({"rotation": 90}, "rotation must be from 0 to 45"),
        ({"colour": "red"}, "unknown colour; known are"),
    ],
)
def test_recipe_errors(values, message):
    with pytest.raises(ValueError, match=message):
        SynthesisRecipe.from_dict(values)


def test_other_errors():
    with pytest.raises(ValueError, match="size must be one of 32, 64, 128, got 48"):
        tiny(48)
    with pytest.raises(ValueError, match="start, count and workers must be 0 or more, got -1"):
        stream(tiny(32), 0, start=-1)
    with pytest.raises(ValueError, match="200 pure samples .* were dropped"):
        make(tiny(32, max_letters=30, random_strings=0.0, paragraph=1.0, paragraphs=("word " * 500,)), 0, 0)


# Contact sheets


@pytest.mark.parametrize("edits", [False, True])
def test_contact_sheet(tmp_path, edits):
    path = tmp_path / "sheet.png"
    write_preview(tiny(32), path, count=5, columns=3, cell=64, edits=edits)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.width > 3 * 64 * (1 + edits) and sheet.height > 2 * 64
    assert list(tmp_path.iterdir()) == [path]


def test_contact_sheet_errors():
    with pytest.raises(ValueError, match="must have samples"):
        preview.contact_sheet([], fonts.find_fonts())


def test_preview_command(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"sizes": [[96, 64]], "languages": ["en"]}')
    for name in ("tiny", str(recipe)):
        out = tmp_path / f"{Path(name).stem}.png"
        result = CliRunner().invoke(app, ["data", "preview", "--out", str(out), "--recipe", name, "--count", "2"])
        assert result.exit_code == 0 and f"2 samples of {name}" in result.output.replace("\n", " ") and out.is_file()
    result = CliRunner().invoke(app, ["data", "preview", "--recipe", "huge"])
    assert result.exit_code == 2 and "error: recipe must be one of tiny, mixed" in result.output

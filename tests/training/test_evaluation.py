"""Metrics against hand-computed values; reading and judging pictures whose text and colours are known."""

import dataclasses
import json
import types

import numpy as np
import pytest
from typer.testing import CliRunner

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.cli import app
from qwen_image_fast.training.evaluation import evaluate_text, ocr
from qwen_image_fast.training.evaluation.cases import (
    TextCase,
    cases_of_file,
    held_out_cases,
    held_out_edits,
    psnr_outside,
)
from qwen_image_fast.training.evaluation.colour_metrics import ground_colour, text_colour
from qwen_image_fast.training.evaluation.evaluate_edit import EditResult, evaluate_edits
from qwen_image_fast.training.evaluation.text_metrics import edit_distance, score, summarise
from qwen_image_fast.training.synthesis.generator import make
from qwen_image_fast.training.synthesis.recipe import tiny
from qwen_image_fast.training.synthesis.words import is_held_out

RECIPE = tiny(128)
UNSEEN = dataclasses.replace(RECIPE, split="held_out")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_word_accuracy_counts_words_that_occur_among_those_read():
    s = score(["Big cat", "DOG"], ["big CAT", "dot"])
    assert (s.words, s.words_right) == (3, 2)
    assert s.similarities[:2] == (1.0, 1.0) and s.similarities[2] == pytest.approx(2 / 3, abs=1e-4)
    assert not s.exact


def test_exact_heeds_case_order_and_extra_words_but_not_spaces():
    assert score(["Big", "cat"], ["Big cat"]).exact and score(["Big cat"], ["Big", "cat"]).exact
    assert not score(["Big"], ["big"]).exact
    assert not score(["a", "b"], ["b", "a"]).exact
    assert not score(["Big"], ["Big", "x"]).exact
    assert not score(["Big"], []).exact and score(["Big"], []).similarities == (0.0,)


def test_text_score_is_a_multiset_match_of_words_or_han_characters():
    english = score(["to be or not to be."], ["to be, to go"])
    assert (english.units, english.units_right) == (6, 3)
    chinese = score(["你好你好，世界"], ["你好世"], "zh")
    assert (chinese.units, chinese.units_right) == (6, 3)


def test_summary_weighs_words_not_pictures():
    total = summarise([score(["a b c"], ["a b c"]), score(["d"], ["x"])])
    assert total.word_accuracy == 0.75 and total.exact == 0.5 and total.pictures == 2
    assert total.ned == pytest.approx(0.75, abs=1e-4)
    with pytest.raises(ValueError, match="must not be empty"):
        summarise([])


@pytest.mark.parametrize("index", range(12))
def test_colours_of_renderings_are_recognised(index):
    sample = make(tiny(128, max_lines=1), 5, index)
    assert ground_colour(sample.image, RECIPE.ground_colours) == sample.colours["ground"]
    assert text_colour(sample.image, sample.boxes[0], RECIPE.text_colours) == sample.colours["text"]


def test_an_empty_box_has_no_text_colour():
    plain = np.full((32, 32, 3), 255, np.uint8)
    assert text_colour(plain, (0, 0, 32, 32), RECIPE.text_colours) is None
    assert text_colour(plain, (40, 40, 50, 50), RECIPE.text_colours) is None


def test_held_out_cases_quote_words_that_training_never_shows():
    for case in held_out_cases(RECIPE, 20):
        assert case.texts and all(is_held_out(text) and text in case.prompt for text in case.texts)
    for pair in held_out_edits(RECIPE, 3, "text"):
        assert pair.kind == "text" and all(is_held_out(text) for text in pair.target_lines)
    for pair in held_out_edits(dataclasses.replace(RECIPE, max_lines=1, edits_of_pictures=1.0), 3, "move"):
        # Of rows alone a shape is moved.
        assert pair.kind == "move" and all(is_held_out(text) for text in pair.source_lines) and pair.source_lines


def test_the_right_answer_counts_as_done_wherever_a_text_was_added():
    pytest.importorskip("rapidocr")
    recipe = dataclasses.replace(RECIPE, max_lines=1, max_letters=6, random_strings=0.0, edits_of_pictures=1.0)
    pairs = [pair for pair in held_out_edits(recipe, 24, "add") if len(pair.target_lines) == 2]
    above = [pair for pair in pairs if pair.target_lines[1] in pair.source_lines]
    assert above and len(above) < len(pairs)
    results = list(evaluate_edits(lambda part, _: [pair.target for pair in part], pairs, ocr.Reader()))
    assert [result.read for result in results if not result.done] == []


def test_a_text_that_moved_and_cannot_be_read_is_not_done():
    (pair,) = held_out_edits(dataclasses.replace(RECIPE, max_lines=1, edits_of_pictures=1.0), 1, "move")
    right, wrong = (score(pair.target_lines, read) for read in (pair.target_lines, ("OLRET",)))
    result = EditResult(pair, pair.target, pair.target_lines, right, 40.0, 40.0, True)
    assert result.done and not dataclasses.replace(result, read=("OLRET",), score=wrong).done


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        '# of "signs"\nA sign "OPEN" above “shop”\n\n{"prompt": "欢迎光临的牌子", "texts": ["欢迎光临"]}\n',
        encoding="utf-8",
    )
    first, second = cases_of_file(path)
    assert first.texts == ("OPEN", "shop") and first.language == "en" and not first.colours
    assert second.texts == ("欢迎光临",) and second.language == "zh"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat\n", "line 1 of .* must quote the text"),
        ('\n{"text": 1}\n', 'line 2 of .* must be JSON with "prompt"'),
        ("{oops\n", "must be JSON"),
        ("\n", "must have at least one prompt"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        cases_of_file(path)


def test_a_prompt_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("“你好”".encode("gbk"))
    with pytest.raises(ValueError, match="not text in UTF-8, as line 1 shows; save it as UTF-8"):
        cases_of_file(path)


def test_psnr_outside_ignores_the_mask():
    wanted = np.zeros((8, 8, 3), np.uint8)
    made, mask = wanted.copy(), np.zeros((8, 8), bool)
    made[:4], mask[:4] = 200, True
    made[6] = 51
    assert psnr_outside(made, wanted, mask) == pytest.approx(10 * np.log10(255**2 / (51**2 / 4)))


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    from qwen_image_fast.training.evaluation.ocr import Reader

    return Reader()


class TestWithReader:
    def run(self, reader, pictures, cases):
        from qwen_image_fast.training.evaluation.evaluate_text import evaluate

        return list(evaluate(lambda part, first: pictures[first : first + len(part)], cases, RECIPE, reader, batch=4))

    def test_true_renderings_are_all_right_and_others_are_not(self, reader, tmp_path):
        from qwen_image_fast.training.evaluation.evaluate_text import read_results, table, write_report

        cases = held_out_cases(RECIPE, 6, seed=3)
        pictures = [make(UNSEEN, 3, i).image for i in range(6)]
        totals = write_report(self.run(reader, pictures, cases), tmp_path / "right", {"steps": 0})
        assert totals["en"]["exact"] == totals["en"]["word_accuracy"] == totals["en"]["colour_accuracy"] == 1.0
        assert "100.0%" in table(totals) and not (tmp_path / "right" / "failures.png").exists()
        assert read_results(tmp_path / "right")["summary"] == json.loads(json.dumps(totals))

        wrong = self.run(reader, [*pictures[1:], pictures[0]], cases)
        totals = write_report(wrong, tmp_path / "wrong", {})
        assert totals["en"]["exact"] == totals["en"]["word_accuracy"] == 0.0 and totals["en"]["colour_accuracy"] < 0.5
        assert (tmp_path / "wrong" / "failures.png").exists()

    def test_a_picture_without_text_reads_as_nothing(self, reader):
        assert reader.read(np.full((128, 128, 3), 255, np.uint8)) == []

    def test_pictures_of_another_type_are_refused(self, reader):
        with pytest.raises(ValueError, match="must be uint8"):
            reader.read(np.zeros((8, 8, 3), np.float32))


class TestAgainst:
    """Two runs on the same prompts: what won and lost, by hand; results that cannot be compared are refused."""

    CASES = tuple(TextCase(f'"{word}" in red', (word,), language)
                  for word, language in (("ab", "en"), ("cd", "en"), ("ef", "en"), ("你好", "zh")))  # fmt: skip

    def results(self, *exact):
        return [evaluate_text.Result(case, np.zeros((8, 8, 3), np.uint8), case.texts if right else (),
                                     score(case.texts, case.texts if right else (), case.language), None)
                for case, right in zip(self.CASES, exact)]  # fmt: skip

    def test_won_and_lost_by_language(self, tmp_path):
        first = evaluate_text.write_report(self.results(True, False, False, True), tmp_path, {})
        assert "against" not in first["en"] and "| 33.3% | 6% to 79% |" in evaluate_text.table(first)
        before = evaluate_text.results_before(tmp_path, self.CASES)
        totals = evaluate_text.write_report(self.results(True, True, True, False), tmp_path / "now", {}, before)
        assert totals["en"]["against"] == {"path": str(tmp_path), "won": 2, "lost": 0, "p": 0.5}
        assert totals["zh"]["against"] == {"path": str(tmp_path), "won": 0, "lost": 1, "p": 1.0}
        assert evaluate_text.read_results(tmp_path / "now")["summary"]["en"]["against"]["won"] == 2

    def test_other_prompts_and_other_files(self, tmp_path):
        evaluate_text.write_report(self.results(True, False, False, True), tmp_path, {})
        with pytest.raises(ValueError, match="--against must be of the same prompts, got 4 others in"):
            evaluate_text.results_before(tmp_path / "results.json", self.CASES[:3])
        for text in ("{oops", '{"pictures": [{"task": "depth"}], "settings": {}}', "[]"):
            (tmp_path / "other.json").write_text(text)
            with pytest.raises(ValueError, match="--against must be results of evaluate text, got"):
                evaluate_text.results_before(tmp_path / "other.json", self.CASES)
        with pytest.raises(ValueError, match="--against must be results"):
            evaluate_text.results_before(tmp_path / "none", self.CASES)


def test_the_command_compares_with_a_run_before(tmp_path, monkeypatch):
    white = np.full((32, 32, 3), 255, np.uint8)
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", lambda *args, **kwargs: types.SimpleNamespace())
    monkeypatch.setattr(evaluate_text, "drawn_by", lambda *args, **kwargs: lambda cases, first: [white] * len(cases))
    monkeypatch.setattr(ocr, "Reader", lambda: types.SimpleNamespace(read=lambda image: []))
    words = ["evaluate", "text", "--count", "2", "--out"]
    assert CliRunner().invoke(app, [*words, str(tmp_path / "first")]).exit_code == 0
    options = ["--steps", "8", "--against", str(tmp_path / "first")]
    result = CliRunner().invoke(app, [*words, str(tmp_path / "second"), *options])
    assert result.exit_code == 0, result.output
    assert "en: 0 won, 0 lost, sign test p 1" in result.stdout and "first: steps" in result.stdout
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("was read"))
    result = CliRunner().invoke(app, [*words, str(tmp_path / "third"), "--seed", "5", *options])
    assert result.exit_code == 2 and not (tmp_path / "third").exists()


def test_a_lora_is_on_the_model_that_is_read(tmp_path, monkeypatch):
    loaded = []
    pipe = types.SimpleNamespace(load_lora_weights=loaded.append)
    white = np.full((32, 32, 3), 255, np.uint8)
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.setattr(evaluate_text, "drawn_by", lambda *args, **kwargs: lambda cases, first: [white] * len(cases))
    monkeypatch.setattr(ocr, "Reader", lambda: types.SimpleNamespace(read=lambda image: []))
    words = ["evaluate", "text", "--count", "1", "--out", str(tmp_path / "out"), "--lora"]
    result = CliRunner().invoke(app, [*words, str(tmp_path)])
    assert result.exit_code == 0 and loaded == [tmp_path], result.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["lora"] == str(tmp_path)
    assert CliRunner().invoke(app, [*words, str(tmp_path / "none")]).exit_code == 2

"""Judges of benchmarks that answer nonsense, are down or fail: what counts, what is kept, what is asked again."""

import pytest
from bench_helpers import CASES, Fake, scores, started

from qwen_image_fast.chat import EndpointError, NoCompletion, NoText
from qwen_image_fast.training.evaluation.bench.answers import JudgeDown
from qwen_image_fast.training.evaluation.bench.judges import Judge


def test_nonsense_is_asked_for_again_then_counted_and_said(tmp_path):
    run = started("dpg", tmp_path, pictures=1)
    fake = Fake({**CASES["dpg"][0], "there a dog": "perhaps"})
    found, result = scores(run, fake.judge)
    assert fake.asked.count("12-0.1") == 3 and result["senseless"] == ["12-0.1"]
    assert found["entity"] == 0 and found["overall"] == 25  # all that hangs on the dog is no
    assert "1 of 4 answers made no sense" in (run.out / "report.html").read_text()
    again = Fake({})
    assert scores(run, again.judge)[1]["senseless"] == ["12-0.1"] and again.asked == []


def test_a_judge_that_makes_no_sense_at_all_is_no_judge(tmp_path):
    """Nothing of it counts or is kept; a proxy that answers with a page of its own is the same."""
    run = started("dpg", tmp_path)
    replies, expected = CASES["dpg"]
    page = "judge: http://x must answer with a chat completion"
    for reply in ("Let me think", NoCompletion(page), NoText("judge: the answer must be a text, got ''")):
        with pytest.raises(JudgeDown, match="made no sense 10 times in a row, the last time by"):
            run.judge(Fake({"": reply}).judge, 2)
        assert (run.out / "answers.jsonl").read_text() == ""
    again = Fake(replies)
    assert scores(run, again.judge)[0] == pytest.approx(expected) and len(again.asked) == 16


def test_few_questions_without_any_sense_are_no_score(tmp_path):
    """Fewer than ten in a row; the judge is asked anew once it is repaired."""
    run = started("dpg", tmp_path, pictures=1)
    with pytest.raises(JudgeDown, match="made no sense whatever it was asked, the last time by 'bananas'"):
        run.judge(Fake({"": "bananas"}).judge, 2)
    assert (run.out / "answers.jsonl").read_text() == ""
    again = Fake(CASES["dpg"][0])
    assert scores(run, again.judge)[1]["senseless"] == [] and len(again.asked) == 4


def test_sense_at_the_third_time_is_sense(tmp_path):
    run = started("dpg", tmp_path, pictures=1)
    said = iter(["", "hm", "yes"])

    def ask(question):
        return next(said) if question.key == "12-0.1" else "yes"

    found, result = scores(run, Judge("judge", "chat", ask))
    assert found["overall"] == 100 and result["senseless"] == []


@pytest.mark.parametrize("status", [None, 500, 401])
def test_a_judge_that_is_down_stops_the_run_and_nothing_is_lost(status, tmp_path):
    run = started("dpg", tmp_path)
    replies, expected = CASES["dpg"]
    down = Fake({"12-2.3": EndpointError("judge: the line is cut", status), **replies})
    with pytest.raises(JudgeDown, match="the judge does not answer: judge: the line is cut; what it has said is kept"):
        run.judge(down.judge, 1, pause=0.0)
    assert down.asked.count("12-2.3") == (1 if status == 401 else 3)
    assert not (run.out / "results.json").exists()
    kept = len((run.out / "answers.jsonl").read_text().splitlines())
    assert kept >= 10
    again = Fake(replies)
    assert scores(run, again.judge)[0] == pytest.approx(expected)
    assert len(again.asked) == 16 - kept and "12-2.3" in again.asked


def test_a_judge_that_fails_is_not_one_that_makes_no_sense(tmp_path):
    """A ValueError of its own, such as a detector's at a picture that it cannot prepare."""
    run = started("dpg", tmp_path)
    replies, expected = CASES["dpg"]
    fails = Fake({"12-2.3": ValueError("mean must have 3 elements"), **replies})
    with pytest.raises(JudgeDown, match=r"failed at 12-2.3, .*12-2\.png: mean must have 3 elements; what it has said"):
        run.judge(fails.judge, 1)
    assert fails.asked.count("12-2.3") == 1 and not (run.out / "results.json").exists()
    again = Fake(replies)
    assert scores(run, again.judge)[0] == pytest.approx(expected) and 0 < len(again.asked) < 16

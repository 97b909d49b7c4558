"""The page on which pictures are compared: what is asked, what is written, what is not served."""

import json
import threading
import urllib.error
import urllib.request

import pytest
from PIL import Image

from qwen_image_fast.png_metadata import write_png
from qwen_image_fast.training.data.prefer import Comparisons, pairs_of, pictures_of, server
from qwen_image_fast.training.sources.lines import pair_lines


@pytest.fixture
def folder(tmp_path):
    """Three pictures of one prompt and two of another, by file or inside; one of a third, which tells nothing."""
    made = tmp_path / "made"
    made.mkdir()
    for n in range(3):
        write_png(made / f"cat{n}.png", Image.new("RGB", (8, 8), (n, 0, 0)), {"kind": "text", "prompt": "a cat"})
    for n in range(3):
        Image.new("RGB", (8, 8)).save(made / f"dog{n}.jpg")
        (made / f"dog{n}{'.txt' if n else '.TXT'}").write_text("a dog" if n < 2 else "a cow")
    (made / "broken.png").write_bytes(b"no")
    return made


def test_pairs_are_those_of_one_prompt(folder):
    pairs = pairs_of(pictures_of(folder))
    assert sorted(pair.prompt for pair in pairs) == ["a cat"] * 3 + ["a dog"]
    assert pairs == pairs_of(pictures_of(folder))
    assert all(pair.left != pair.right for pair in pairs)


def test_answers_are_written_at_once_and_never_asked_again(folder, tmp_path, caplog):
    out = tmp_path / "pairs.jsonl"
    asked = Comparisons(pairs_of(pictures_of(folder)), out)
    first = asked.next()[1]
    asked.answer(0, "right")
    second = asked.next()[1]
    asked.answer(1, "left")
    asked.answer(1, "left")  # a second click on an old page
    asked.answer(2, "skip")
    written = pair_lines(str(out), both=True)
    assert [(line.prompt, line.chosen, line.rejected) for line in written] == [
        (first.prompt, first.right, first.left), (second.prompt, second.left, second.right)
    ]  # fmt: skip
    with open(out, "a") as file:
        file.write('{"prompt": "half')
    again = Comparisons(pairs_of(pictures_of(folder)), out)
    assert again.next()[0] == 3 and again.next()[1] not in (first, second)
    assert "was half written" in caplog.text
    again.answer(3, "left")  # not behind the half line
    assert len(pair_lines(str(out), both=True)) == 3
    out.write_text(out.read_text().rstrip("\n"))  # whole, as an editor may leave it
    assert Comparisons(pairs_of(pictures_of(folder)), out).next()[0] == 4
    assert len(pair_lines(str(out), both=True)) == 3


def test_an_answer_is_taken_back(folder, tmp_path):
    asked = Comparisons(pairs_of(pictures_of(folder)), tmp_path / "pairs.jsonl")
    first = asked.next()[1]
    for choice in ("left", "undo", "skip", "undo", "undo"):
        asked.answer(asked.next()[0], choice)
    assert asked.next() == (0, first)
    assert (tmp_path / "pairs.jsonl").read_text() == "" == (tmp_path / "pairs.jsonl.passed").read_text()
    with pytest.raises(ValueError, match="choice must be left, right, skip or undo"):
        asked.answer(0, "both")


def test_a_folder_without_two_of_a_prompt(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no two pictures of one prompt"):
        pictures_of(tmp_path)


def test_the_page_on_this_machine_alone(folder, tmp_path):
    asked = Comparisons(pairs_of(pictures_of(folder)), tmp_path / "pairs.jsonl")
    with server(asked, 0) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{page.server_address[1]}"
        try:

            def send(path, body=None, **headers):
                data = None if body is None else json.dumps(body).encode()
                headers = {"Content-Type": "application/json", **headers}
                with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as answer:
                    return answer.headers["Content-Type"], answer.read()

            assert b"Which is better?" in send("/")[1]
            state = json.loads(send("/next")[1])
            assert state["total"] == 4 and state["done"] == 0 and state["more"]
            left = asked.next()[1].left
            assert send("/left?0") == ({".png": "image/png", ".jpg": "image/jpeg"}[left.suffix], left.read_bytes())
            send("/", {"done": 0, "choice": "left"})
            assert len(pair_lines(str(tmp_path / "pairs.jsonl"), both=True)) == 1
            for path, body, headers, status in (
                ("/next", None, {"Host": "evil.example"}, 403),
                ("/", {"done": 1, "choice": "left"}, {"Host": "e"}, 403),
                ("/", {"done": 1, "choice": "left"}, {"Content-Type": "text/plain"}, 400), ("/", {"done": 1}, {}, 400),
                ("/../pairs.jsonl", None, {}, 404), ("/", ["x"], {}, 400),
            ):  # fmt: skip
                with pytest.raises(urllib.error.HTTPError) as refused:
                    send(path, body, **headers)
                assert refused.value.code == status
            assert asked.next()[0] == 1
        finally:
            page.shutdown()

"""The captions that docs/tiny.md says the tiny model knows."""

import re
from pathlib import Path

import pytest
from synthesis_helpers import needs_chinese

from qwen_image_fast.training.synthesis import stream, tiny


@needs_chinese
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_captions_that_the_tiny_model_is_said_to_know_are_of_its_training(language):
    """Of docs/tiny.md the table, by form: texts, colours, shapes, numbers and directions are any."""
    page = (Path(__file__).parents[2] / "docs/tiny.md").read_text(encoding="utf-8")
    table = page[page.index("| what | English | Chinese |") :].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines()[2:]]
    told = [row[1 if language == "en" else 2].strip("`| ") for row in rows]
    words = {
        "en": ((r'"\w+"', "TEXT"), (r"\b(circle|square|triangle|star)s?\b", "SHAPE"), (r"\ban\b", "a"),
               (r"\b(red|orange|yellow|green|blue|purple|black|white|pink)\b", "COLOUR"),
               (r"\b(two|three|four)\b", "N"), (r"left of|right of|above|below", "BESIDE")),
        "zh": ((r"“\w+”", "TEXT"), (r"圆形|正方形|三角形|五角星", "SHAPE"), (r"[红橙黄绿蓝紫黑白粉]色", "COLOUR"),
               (r"[两三四]个", "N"), (r"左边|右边|上面|下面|上方|下方", "BESIDE")),
    }  # fmt: skip

    def form(caption):
        for pattern, name in words[language]:
            caption = re.sub(pattern, name, caption)
        return caption

    shapes = {"shapes": 1.0, "pure": 0.0}
    seen = {
        form(sample.caption)
        for changes in ({"max_lines": 1}, {"max_lines": 1, "natural": 1.0}, shapes, {**shapes, "arranged": 1.0})
        for sample in stream(tiny(128, (language,), **changes), 0, 0, 40)
    }
    assert len(told) == 6 and {form(caption) for caption in told} <= seen
    assert form('red "HELLO" on white') not in seen and form("红色的“你好”,白底") not in seen

"""What is written: no held-out text is trained on, and Chinese is made of the listed characters."""

import random

import pytest

from qwen_image_fast.training.synthesis import words


@pytest.mark.parametrize("language", ["en", "zh"])
def test_held_out_texts_are_never_trained_on(language):
    train, held_out = words.WordSource("train"), words.WordSource("held_out")
    rng = random.Random(0)
    trained = {train.text(rng, language, 4).casefold() for _ in range(2000)}
    trained |= {train.phrase(rng, language, 1).casefold() for _ in range(500)}
    evaluated = {held_out.text(rng, language, 4).casefold() for _ in range(500)}
    assert not trained & evaluated and len(evaluated) > 100
    assert not any(words.is_held_out(text) for text in trained)
    assert all(words.is_held_out(text) for text in evaluated)
    share = sum(map(words.is_held_out, (f"{i:05}" for i in range(5000)))) / 5000
    assert share == pytest.approx(0.1, abs=0.02)


def test_chinese_sentences_do_not_contain_held_out_words():
    rng, source = random.Random(1), words.WordSource()
    hidden = [word for word in words.HAN_WORDS if words.is_held_out(word)]
    text = "".join(source.sentence(rng, "zh") for _ in range(200))
    assert len(hidden) > 5 and not [word for word in hidden if word in text]


def test_han_words_are_made_of_the_listed_characters():
    assert set("".join(words.HAN_WORDS)) <= set(words.HAN_CHARACTERS)
    assert 200 <= len(set(words.HAN_CHARACTERS)) <= 220
    # The first level of GB2312, each character of which is one token of the tiny tokenizer.
    assert all(0xB0 <= character.encode("gb2312")[0] <= 0xD7 for character in words.HAN_CHARACTERS)
    assert len(set(words.ENGLISH_WORDS)) == len(words.ENGLISH_WORDS)
    assert set(words.TINY_HAN_CHARACTERS) <= set(words.HAN_CHARACTERS)
    assert len(set(words.TINY_HAN_CHARACTERS)) == len(words.TINY_HAN_CHARACTERS) == 110


@pytest.mark.parametrize("split", words.SPLITS)
def test_chinese_texts_are_made_of_the_characters_of_the_recipe(split):
    source, rng = words.WordSource(split, han=words.TINY_HAN_CHARACTERS), random.Random(0)
    texts = {source.text(rng, "zh", 3) for _ in range(300)}
    assert len(texts & set(words.HAN_WORDS)) >= 10 and len(texts) > 100
    assert set("".join(texts)) <= set(words.TINY_HAN_CHARACTERS)

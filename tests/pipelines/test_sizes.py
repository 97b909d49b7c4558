"""Pictures far larger than the model knows are said to be so, before the work on them begins."""

import pytest
from test_finite import PICTURES, load, made_by

from qwen_image_fast import FlowMatchEulerDiscreteScheduler


class Begun(Exception):
    """What takes minutes of a large picture."""


def begin(*args, **kwargs):
    raise Begun


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("known", [3, 4])
def test_a_picture_larger_than_the_schedule_knows(edit_folder, name, known, caplog):
    pipe = load(name, edit_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, max_image_seq_len=known)
    pipe.vae.encode = pipe._denoise = begin
    caplog.clear()  # of what diffusers says of its models
    for _ in range(2):
        with pytest.raises(Begun):
            made_by(pipe)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (known < 4)
    assert all(text.startswith("a picture of 32x32 has 4 tokens, where the model knows up to 3, and") for text in said)


def test_a_large_reference_of_a_small_picture(edit_folder, caplog):
    pipe = load("QwenImageEditPlusPipeline", edit_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, max_image_seq_len=3)
    made_by(pipe, width=16, height=16)
    assert "a picture of 32x32 has 4 tokens" in caplog.text

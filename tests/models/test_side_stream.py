"""The text stream beside the image, and products of rows that lie apart: CUDA's ways, on the CPU."""

import contextlib

import pytest
import torch
from torch import nn

from qwen_image_fast.models import side_stream, stream_linear


class OnCuda(torch.Tensor):
    is_cuda = True


class Stream:
    cuda_stream = 7

    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def said(monkeypatch):
    """What is queued, in order."""
    said = []

    @contextlib.contextmanager
    def entered(stream):
        said.append(f"enter {stream.name}")
        yield
        said.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main", said))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", said))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    side_stream._side_stream.cache_clear()
    yield said
    side_stream._side_stream.cache_clear()


def run(said, on):
    work = lambda name: lambda: said.append(name) or name  # noqa: E731
    return side_stream.both(work("image"), work("text"), on)


def test_it_begins_behind_what_was_queued_and_ends_before_what_follows(said):
    """The text's work first: memory that the image's frees is then not given to it."""
    on = torch.zeros(2).as_subclass(OnCuda)
    with torch.no_grad():
        assert run(said, on) == ("image", "text")
    assert said == [
        "side waits for main", "enter side", "text", "leave side", "image", "main waits for side"
    ]  # fmt: skip


@pytest.mark.parametrize("on", [torch.zeros(2), torch.zeros(2).as_subclass(OnCuda)], ids=["cpu", "gradients"])
def test_one_after_the_other_elsewhere(said, on):
    assert run(said, on) == ("image", "text") and said == ["image", "text"]


def test_one_stream_for_each_that_work_is_queued_in(said):
    streams = [side_stream._side_stream(torch.device("cuda:0"), n) for n in (7, 7, 8)]
    assert streams[0] is streams[1] is not streams[2]


def test_rows_that_lie_apart():
    torch.manual_seed(0)
    layer, parts = nn.Linear(24, 16), [torch.randn(n, 24) for n in (5, 1, 7)]
    with torch.no_grad():
        out, whole = stream_linear.of_parts(layer, parts), layer(stream_linear.joined(parts))
    torch.testing.assert_close(out, whole)


def test_which_rows_are_multiplied_where_they_lie(monkeypatch):
    monkeypatch.setattr(stream_linear, "_alone_on_cuda", lambda x: True)
    layer = nn.Linear(4, 4)

    def apart(*rows, layer=layer):
        return stream_linear.multiplied_apart([layer], [[torch.zeros(n, 4) for n in rows]])

    assert apart(1024, 4096) and not apart(4096) and not apart(1023, 4096) and not apart(*[1024] * 5)
    layer.register_forward_hook(lambda *_: None)
    assert not apart(1024, 4096)
    assert not apart(1024, 4096, layer=nn.Linear(4, 4, bias=False))


def test_no_gradients_and_no_launch_of_both_streams(monkeypatch):
    on = torch.zeros(2, 4).as_subclass(OnCuda)
    monkeypatch.setattr(stream_linear, "_plain", lambda layer, x: True)
    monkeypatch.setattr(stream_linear, "groups_streams", lambda x: False)
    assert not stream_linear.text_apart([None], on)
    with torch.no_grad():
        assert stream_linear.text_apart([None], on) and not stream_linear.text_apart([None], torch.zeros(2, 4))
        monkeypatch.setattr(stream_linear, "groups_streams", lambda x: True)
        assert not stream_linear.text_apart([None], on)

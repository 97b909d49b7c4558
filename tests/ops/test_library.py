"""What the ops say where they cannot run, and how they reach the CUDA kernels."""

import pytest
import torch

from qwen_image_fast.ops import _library, gelu_tanh, layer_norm_modulate, qk_norm_rope


class OnCuda:
    """As much of a CUDA tensor as the checks look at."""

    is_cpu, is_meta, is_cuda, device = False, False, True, "cuda:0"

    def __init__(self, dtype=torch.bfloat16, rows=4, address=64, width=8):
        self.dtype, self.shape, self.address = dtype, (rows, width), address

    def dim(self):
        return 2

    def numel(self):
        return self.shape[0] * self.shape[1]

    def element_size(self):
        return 2

    def data_ptr(self):
        return self.address


def test_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr(_library, "_has_cuda", False)
    with pytest.raises(NotImplementedError, match="^op: this build has kernels for cpu, got a tensor on cuda:0; .*ON$"):
        _library.check_device("op", OnCuda())


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (OnCuda(torch.float64), TypeError, "dtype must be float32, float16 or bfloat16 on CUDA, got torch.float64"),
        (OnCuda(rows=2**31), ValueError, "rows must be fewer than 2\\^31 on CUDA, got 2147483648"),
        (OnCuda(width=2**31), ValueError, "last dimension must be smaller than 2\\^31 on CUDA, got 2147483648"),
        (OnCuda(address=65), ValueError, "data must be aligned to its 2-byte elements, got 0x41"),
    ],
)
def test_what_the_cuda_kernels_do_not_take(monkeypatch, tensor, error, text):
    monkeypatch.setattr(_library, "_has_cuda", True)
    monkeypatch.setattr(_library, "_plain_types", (OnCuda,))
    _library.check_device("op", OnCuda())
    with pytest.raises(error, match=f"^op: {text}"):
        _library.check_device("op", tensor)


def test_more_segments_than_a_grid_has_rows():
    _library.check_offsets("op", OnCuda(rows=2**17), None, 2**16 - 2**15)
    with pytest.raises(ValueError, match="^op: segments must be fewer than 2\\^16 on CUDA, got 65536"):
        _library.check_offsets("op", OnCuda(rows=2**17), None, 2**16)


def test_tensors_on_two_devices():
    x, v = torch.randn(4, 8), torch.randn(1, 8, device="meta")
    with pytest.raises(ValueError, match="^layer_norm_modulate: shift must be on the device of the first input, cpu"):
        layer_norm_modulate(x, v, v)


def test_kernel_errors_name_the_op(emulated_device, monkeypatch):
    """An access outside of the tensors of the call, here by a row count that is too large."""
    x, v = torch.randn(4, 64), torch.randn(1, 64)
    with emulated_device, pytest.raises(RuntimeError, match="global memory outside of every tensor"):
        _library.launch(
            "layer_norm_modulate_forward", x, x.data_ptr(), v.data_ptr(), v.data_ptr(), 64, 64, 0, x.data_ptr(),
            5, 64, 1, 1e-6, 0,
        )  # fmt: skip


def test_no_float64_on_cuda(emulated_device):
    with emulated_device, pytest.raises(TypeError, match="float64"):
        gelu_tanh(torch.randn(4, dtype=torch.float64))


def test_wide_heads_are_refused_on_cuda(monkeypatch):
    monkeypatch.setattr(_library, "_has_cuda", True)
    source = torch.empty(1, 1, 264)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    with pytest.raises(ValueError, match="^qk_norm_rope: head_dim must be at most 256 on CUDA, got 264"):
        qk_norm_rope(*[source] * 6, *[source[0, 0]] * 4, *[source] * 2, *[torch.zeros(2, dtype=torch.int32)] * 2)


@pytest.mark.parametrize("current", [0, 1])
def test_launch_takes_the_stream_and_the_device_of_the_tensor(monkeypatch, current):
    calls = []

    class Module:
        gelu_tanh_forward_cuda = staticmethod(lambda *a: calls.append(a))
        gelu_tanh_forward_scratch = staticmethod(lambda n: n)

    class Tensor:
        is_cpu, device = False, "cpu"

        def get_device(self):
            return 1

    class Device:
        def __init__(self, index):
            calls.append(f"device {index}")

        __enter__ = __exit__ = lambda self, *_: None

    monkeypatch.setattr(_library, "_C", Module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: type("Stream", (), {"cuda_stream": 100 + d}))
    monkeypatch.setattr(torch.cuda, "device", Device)
    _library.launch("gelu_tanh_forward", Tensor(), 1, 2, scratch=(16,))
    assert calls[:-1] == ([] if current == 1 else ["device 1"])
    *args, scratch, stream = calls[-1]
    assert args == [1, 2] and scratch != 0 and stream == 101

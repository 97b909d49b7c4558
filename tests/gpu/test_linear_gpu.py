"""The kernels from CUTLASS against the products in float64: odd rows, no text, many samples, both sizes of tiles; those
in 8 bits against the CPU's bits."""

import pytest
import torch

from qwen_image_fast import _C
from qwen_image_fast.ops import (
    Int8Weight,
    gelu_tanh,
    int8_kernels,
    int8_rows,
    linear_gate_residual,
    linear_gelu,
    linear_int8,
    linear_kernels,
    linear_qkv,
)

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.build_info()["cuda_architectures"]),
    reason="needs a GPU and a build with CUDA",
)
KERNELS = ["cutlass large", "cutlass small"]
DTYPES = [torch.bfloat16, torch.float16]
ROWS = [(1, 1), (300, 7), (257, 0), (0, 65), (1027, 129), (128, 128)]
SIZES = [(64, 128), (200, 264), (1024, 512)]  # depth, columns; also ones that no tile divides


def layer(rows, depth, columns, dtype):
    x = torch.randn(rows, depth, device="cuda", dtype=dtype)
    weight = (torch.randn(columns, depth, device="cuda") * depth**-0.5).to(dtype)
    return x, weight, torch.randn(columns, device="cuda", dtype=dtype)


def exact(x, weight, bias):
    return torch.nn.functional.linear(x.double(), weight.double(), bias.double())


def assert_close(out, expected, dtype):
    assert out.shape == expected.shape and out.isfinite().all()
    if out.numel():  # sums in float32 and one rounding
        assert ((out.double() - expected).abs() <= torch.finfo(dtype).eps * (expected.abs() + 1e-2)).all()


@pytest.fixture(params=KERNELS)
def kernel(request):
    torch.manual_seed(0)
    with linear_kernels(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_qkv_and_gelu(size, rows, dtype, kernel):
    layers = [layer(n, *size, dtype) for n in rows]
    six = [layers[0], layer(rows[0], *size, dtype), layer(rows[0], *size, dtype), layers[1]]
    six += [layer(rows[1], *size, dtype) for _ in range(2)]
    for out, args in zip(linear_qkv(*zip(*six)), six):
        assert_close(out, exact(*args), dtype)
    for out, args in zip(linear_gelu(*zip(*layers)), layers):
        assert_close(out, torch.nn.functional.gelu(exact(*args), approximate="tanh"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 11])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gate_residual(size, rows, samples, dtype, kernel):
    layers = [layer(n, *size, dtype) for n in rows]
    residual = [torch.randn(n, size[1], device="cuda", dtype=dtype) for n in rows]
    gate = [torch.randn(samples, 3, size[1], device="cuda", dtype=dtype)[:, 1] for _ in rows]  # strided
    cuts = [torch.randint(0, n + 1, (samples - 1,)).sort().values.tolist() for n in rows]  # some samples are empty
    offsets = [torch.tensor([0, *c, n], device="cuda", dtype=torch.int32) for c, n in zip(cuts, rows)]
    outs = linear_gate_residual(residual, *zip(*layers), gate, offsets)
    for out, args, r, g, o in zip(outs, layers, residual, gate, offsets):
        per_row = g.double().repeat_interleave(o.diff(), 0)
        assert_close(out, r.double() + per_row * exact(*args), dtype)


def test_equal_segments_and_one_stream(kernel):
    args = layer(96, 64, 128, torch.bfloat16)
    residual, gate = (torch.randn(n, 128, device="cuda", dtype=torch.bfloat16) for n in (96, 4))
    (out,) = linear_gate_residual([residual], *([a] for a in args), [gate], [None])
    assert_close(out, residual.double() + gate.double().repeat_interleave(24, 0) * exact(*args), torch.bfloat16)


def test_more_than_two_to_the_31_elements(kernel):
    rows, columns = 2**31 // 4096 + 128, 4096
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * columns:
        pytest.skip("needs 13 GB of free memory")
    x, weight, bias = layer(rows, 64, columns, torch.bfloat16)
    (out,) = linear_gelu([x], [weight], [bias])
    last = torch.nn.functional.gelu(exact(x[-200:], weight, bias), approximate="tanh")
    assert_close(out[-200:], last, torch.bfloat16)


def test_alone_or_beside_another_stream(kernel):
    """A row's bits do not depend on the other problems of its launch."""
    a, b = layer(300, 64, 128, torch.bfloat16), layer(77, 64, 128, torch.bfloat16)
    together = linear_gelu(*zip(a, b))
    for args, out in zip((a, b), together):
        assert torch.equal(linear_gelu(*([t] for t in args))[0], out)
        assert torch.equal(linear_gelu([args[0][5:9].contiguous()], [args[1]], [args[2]])[0], out[5:9])


def test_in_a_cuda_graph_and_on_a_side_stream(kernel):
    args = [layer(n, 64, 128, torch.bfloat16) for n in (200, 9)]
    expected = linear_gelu(*zip(*args))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = linear_gelu(*zip(*args))
    for out in outs:
        out.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outs, expected))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outs = linear_gelu(*zip(*args))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outs, expected))


def test_torch_agrees():
    args = layer(300, 64, 128, torch.bfloat16)
    with linear_kernels("torch"):
        (out,) = linear_gelu(*([a] for a in args))
    assert torch.equal(out, gelu_tanh(torch.nn.functional.linear(*args)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_transformer_in_fused_launches(dtype):
    """With every linear layer of a block in one launch per pair; close to the modules, with and without gradients."""
    from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

    torch.manual_seed(0)
    config = {"num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 96,
              "axes_dims_rope": (8, 28, 28), "in_channels": 16, "out_channels": 4}  # fmt: skip
    model = QwenImageTransformer2DModel(**config).to("cuda", dtype)
    img, txt = (torch.randn(*s, device="cuda", dtype=dtype, requires_grad=True) for s in ((2, 30, 16), (2, 7, 96)))

    def run(choice):
        with linear_kernels(choice):
            out = model(
                hidden_states=img, encoder_hidden_states=txt, img_shapes=[[(1, 6, 5)]] * 2, return_dict=False,
                timestep=torch.tensor([0.3, 0.8], device="cuda", dtype=dtype),
            )[0]  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), [img, txt])]

    for a, b in zip(run("cutlass"), run("torch")):
        a, b = a.double(), b.double()
        assert (a - b).pow(2).mean().sqrt() <= 16 * torch.finfo(dtype).eps * b.pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_in_the_epilogue_of_cublaslt(dtype):
    args = layer(1027, 200, 512, dtype)
    with torch.no_grad():
        (out,) = linear_gelu(*([t] for t in args))
    assert_close(out, torch.nn.functional.gelu(exact(*args), approximate="tanh"), dtype)


def by_wgmma(rows, depth, columns, dtype, segments=None):
    """One call on Hopper, with gate and residual for `segments` (None: without) of equal length; the CPU's bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    there, draw = torch.device("cuda"), torch.Generator().manual_seed(depth)
    taken = [torch.randn(n, depth, generator=draw) for n in rows]
    weight = [
        Int8Weight.of(torch.randint(-128, 128, (columns, depth), dtype=torch.int8, generator=draw), torch.rand(1), 16)
        for _ in rows
    ]
    bias = [torch.randn(columns, generator=draw).to(dtype) for _ in rows]
    gated = []
    if segments is not None:
        gated = [[torch.randn(n, columns, generator=draw).to(dtype) for n in rows],
                 [torch.randn(segments, columns, generator=draw).to(dtype) for _ in rows]]  # fmt: skip
    expected = linear_int8([int8_rows(t, 16) for t in taken], weight, bias, dtype, *gated)
    with int8_kernels("wgmma"):
        moved = [int8_rows(t.to(there), 16) for t in taken], [w.to(there) for w in weight], [b.to(there) for b in bias]
        found = linear_int8(*moved, dtype, *([t.to(there) for t in tensors] for tensors in gated))
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all() and torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(16, 8), (80, 136), (1344, 264), (3072, 3072)], ids=str)
def test_8_bits(size, dtype):
    by_wgmma((300, 7, 129, 0, 64, 1, 33), *size, dtype)
    by_wgmma((1026, 30), *size, dtype, segments=3)


def test_8_bits_of_equal_segments():
    by_wgmma((300, 7), 272, 264, torch.bfloat16)
    by_wgmma((300, 6), 272, 264, torch.bfloat16, segments=2)

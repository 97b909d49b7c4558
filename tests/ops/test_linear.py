"""linear_qkv, linear_gelu and linear_gate_residual: the op tests, the choice of kernels, and what a launch is given."""

import ctypes
import json

import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast import ops
from qwen_image_fast.ops import _library, _linear, linear_gate_residual, linear_gelu, linear_kernels, linear_qkv
from qwen_image_fast.ops.linear_gate_residual import linear_gate_residual_reference
from qwen_image_fast.ops.linear_gelu import linear_gelu_reference
from qwen_image_fast.ops.linear_qkv import linear_qkv_reference


def layer(depth, columns):
    return torch.randn(columns, depth) / depth**0.5, torch.randn(columns)


def make(img_rows, txt_rows, depth, columns):
    return tuple(t for rows in (img_rows, txt_rows) for t in (torch.randn(rows, depth), *layer(depth, columns)))


def make_gated(img_rows, txt_rows, depth, columns, segments=1, packed=False):
    args, every = [], make(img_rows, txt_rows, depth, columns)
    for i, rows in enumerate((img_rows, txt_rows)):
        offsets = None
        if packed:
            cuts = sorted(torch.randint(0, rows + 1, (segments - 1,)).tolist())
            offsets = torch.tensor([0, *cuts, rows], dtype=torch.int32)
        gate = (torch.randn(segments, 2, columns) * 0.7).unbind(1)[1]
        args += [torch.randn(rows, columns), *every[3 * i : 3 * i + 3], gate, offsets]
    return tuple(args)


def by_stream(fn, count):
    """A function of lists as one of tensors: all of the first stream, then all of the second."""

    def run(*args):
        return tuple(fn(*([args[i], args[count + i]] for i in range(count))))

    return run


def both(fn, reference, count, make):
    return Op(by_stream(fn, count), by_stream(reference, count), make)


QKV = both(linear_qkv, linear_qkv_reference, 3, make)
GELU = both(linear_gelu, linear_gelu_reference, 3, make)
GATED = both(linear_gate_residual, linear_gate_residual_reference, 6, make_gated)
CASES = [
    pytest.param(QKV, (10, 3, 7, 5), id="qkv"), pytest.param(QKV, (40, 6, 64, 96), id="qkv-larger"),
    pytest.param(GELU, (10, 3, 7, 5), id="gelu"), pytest.param(GELU, (40, 6, 64, 96), id="gelu-larger"),
    pytest.param(GATED, (10, 4, 7, 5, 2), id="gate"), pytest.param(GATED, (10, 3, 7, 5, 3, True), id="gate-packed"),
    pytest.param(GATED, (40, 6, 96, 64, 1), id="gate-one-segment"),
]  # fmt: skip
SMALL = [CASES[0], CASES[2], CASES[4], CASES[5]]


@pytest.fixture(params=["cpu", "cuda", "cuda-cutlass"])
def place(request):
    """The CPU; on a GPU torch's products and the kernels from CUTLASS."""
    if request.param == "cpu":
        yield
        return
    if not (torch.cuda.is_available() and _linear._C.build_info()["cuda_architectures"]):
        pytest.skip("needs a GPU and a build with CUDA")
    with torch.device("cuda"), linear_kernels("torch" if request.param == "cuda" else "cutlass"):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_accuracy(op, shape, dtype, place):
    if place == "cuda-cutlass":
        if dtype == torch.float32:
            pytest.skip("products of 16-bit tensors")
        shape = (*(8 * n if i < 4 else n for i, n in enumerate(shape)),)
    harness.check_accuracy(op, dtype, *shape)


@pytest.mark.parametrize(("op", "shape"), SMALL)
def test_gradcheck(op, shape):
    harness.check_gradcheck(op, *shape)


@pytest.mark.parametrize(("op", "shape"), SMALL)
def test_compile(op, shape):
    larger = (shape[0] + 2, shape[1] + 2, *shape[2:])
    harness.check_compile(op, shape, larger)


def test_opcheck():
    torch_ops = torch.ops.qwen_image_fast
    for op, registered in ((QKV, torch_ops.linear_qkv), (GELU, torch_ops.linear_gelu)):
        args = op.inputs(torch.float32, 5, 3, 8, 6, grad=True)
        harness.check_opcheck(registered, [[args[i], args[3 + i]] for i in range(3)] + ["torch"])
    args = GATED.inputs(torch.float32, 6, 4, 8, 6, 2, True, grad=True)
    harness.check_opcheck(torch_ops.linear_gate_residual, [[args[i], args[6 + i]] for i in range(6)] + ["torch"])


@pytest.mark.parametrize(("op", "shape"), SMALL)
def test_the_same_bits_in_every_run(op, shape):
    runs = []
    for _ in range(2):
        args = op.inputs(torch.bfloat16, *shape, grad=True)
        outs = harness.results(op.fn, args)
        runs.append([*outs, *harness.gradients(outs, op.differentiable(args), [torch.ones_like(o) for o in outs])])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_only_the_gradients_asked_for():
    args = GATED.inputs(torch.float32, 6, 4, 8, 8, 2)
    args[1].requires_grad_()
    args[10].requires_grad_()
    outs = harness.results(GATED.fn, args)
    exact = harness.results(GATED.reference, args)
    for a, b in zip(*(torch.autograd.grad(sum(o.sum() for o in r), [args[1], args[10]]) for r in (outs, exact))):
        torch.testing.assert_close(a, b)


def test_the_bits_of_the_separate_passes():
    """On the CPU the ops are the products of the modules and the kernel of gelu_tanh."""
    x, w, b = make(9, 1, 16, 24)[:3]
    assert torch.equal(linear_gelu([x], [w], [b])[0], ops.gelu_tanh(torch.nn.functional.linear(x, w, b)))
    assert torch.equal(linear_qkv([x], [w], [b])[0], torch.nn.functional.linear(x, w, b))


def test_empty_text():
    for op, tail in ((QKV, ()), (GELU, ()), (GATED, (1,))):
        args = op.inputs(torch.float32, 4, 0, 8, 6, *tail, grad=True)
        outs = harness.results(op.fn, args)
        assert outs[1].shape == (0, 6)
        sum(o.sum() for o in outs).backward()
        assert all(a.grad is not None for a in op.differentiable(args))


def test_float16_saturates():
    x, w, b = torch.ones(1, 8).half(), torch.full((8, 8), 1e4).half(), torch.zeros(8).half()
    gate, residual = torch.linspace(-4, 4, 8).half()[None], torch.zeros(1, 8).half()
    (out,) = linear_gate_residual([residual], [x], [w], [b], [gate], [None])
    assert out.isfinite().all() and out.abs().max() == 65504


# ---- errors ---------------------------------------------------------------------------------------------------------

X, W, B, G = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), torch.randn(2, 6)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (([], [], []), ValueError, "x must hold 1 to 2 tensors, got 0"),
        (([X] * 3, [W] * 3, [B] * 3), ValueError, "x must hold 1 to 2 tensors, got 3"),
        (([X, X], [W], [B, B]), ValueError, "weight must hold 2 tensors like x, got 1"),
        (([X[:, :4].contiguous()], [W], [B]), ValueError, r"x must have the shape \[rows, 8\], got \(4, 4\)"),
        (([X, X], [W, W[:4]], [B, B]), ValueError, r"weight must have one shape, \(6, 8\), got \(4, 8\)"),
        (([X], [W], [B[:4]]), ValueError, r"bias must have the shape \(6,\), got \(4,\)"),
        (([X], [W.half()], [B]), TypeError, "weight must have the dtype of the first input, torch.float32"),
        (([X], [W], [B.to("meta")]), ValueError, "bias must be on the device of the first input, cpu, got meta"),
        (([X.t().contiguous().t()], [W], [B]), ValueError, "x must be contiguous"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^linear_gelu: {text}"):
        linear_gelu(*args)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({0: [torch.randn(4, 5)]}, ValueError, r"residual must have the shape \(4, 6\), got \(4, 5\)"),
        ({4: []}, ValueError, "gate must hold 1 tensors like x, got 0"),
        ({4: [G[:, :4]]}, ValueError, "gate must have the width of x, 6"),
        ({5: [torch.tensor([0, 1, 3], dtype=torch.int32)]}, ValueError, "offsets must rise from 0 to the number"),
    ],
)
def test_errors_of_the_gated_product(changes, error, text):
    args = [[torch.randn(4, 6)], [X], [W], [B], [G], [None]]
    for i, value in changes.items():
        args[i] = value
    with pytest.raises(error, match=f"^linear_gate_residual: {text}"):
        linear_gate_residual(*args)


# ---- the choice of kernels ------------------------------------------------------------------------------------------


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda, requires_grad = True, False

    def __init__(self, rows, columns, dtype=torch.bfloat16, address=64):
        self.shape, self.dtype, self.address = (rows, columns), dtype, address

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.address


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(_linear, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_library, "_plain_types", (OnCuda,))


def test_the_committed_table_names_known_kernels():
    table = json.loads(_linear.TABLE.read_text())
    for entries in table["faster"].values():
        for rows in entries.values():
            assert all(int(r) > 0 and k in ("torch", *_linear.TILES) for r, k in rows.items())
    assert bool(table["faster"]) == bool(table["measured_by"])


def test_the_table_decides(hopper, monkeypatch):
    x, w = [OnCuda(4096, 3072), OnCuda(50, 3072)], [OnCuda(12288, 3072)] * 2
    monkeypatch.setattr(_linear, "_faster", {})
    assert _linear.kernel_for("linear_gelu", x, w) == "cublaslt" and not _linear.groups_streams(x[0])
    assert _linear.kernel_for("linear_qkv", x, w) == "torch" and not _linear.fused("linear_qkv", x, w)
    rows = {"1024": "cutlass small", "4096": "cutlass large", "9000": "torch"}
    monkeypatch.setattr(_linear, "_faster", {"sm_90": {"linear_gelu 3072 -> 12288": rows}})
    assert _linear.groups_streams(x[0])
    for count, kernel in ((50, "cublaslt"), (1024, "cutlass small"), (5000, "cutlass large"), (9000, "cublaslt")):
        assert _linear.kernel_for("linear_gelu", [OnCuda(count, 3072)], w[:1]) == kernel
    assert _linear.kernel_for("linear_qkv", x, w) == "torch"
    assert _linear.kernel_for("linear_gelu", [OnCuda(4096, 3072, torch.float32)], w[:1]) == "torch"
    assert _linear.kernel_for("linear_gelu", [OnCuda(4096, 3072, address=72)], w[:1]) == "cublaslt"


def test_gelu_in_the_epilogue_where_no_gradient_is_asked_for(hopper, monkeypatch):
    x, w = [OnCuda(4096, 3072)], [OnCuda(12288, 3072)]
    w[0].requires_grad = True
    assert _linear.kernel_for("linear_gelu", x, w) == "torch"
    with torch.no_grad():
        assert _linear.kernel_for("linear_gelu", x, w) == "cublaslt"
        assert _linear.kernel_for("linear_gelu", [OnCuda(4096, 3072, torch.float32)], w) == "torch"
        with linear_kernels("torch"):
            assert _linear.kernel_for("linear_gelu", x, w) == "torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_gelu_in_the_epilogue(dtype, monkeypatch):
    """Activated as summed and rounded once, as cuBLASLt does: a fifth less error than with two roundings."""

    def once(bias, x, weight, use_gelu):
        assert use_gelu
        y = torch.addmm(bias.float(), x.float(), weight.float())
        return torch.nn.functional.gelu(y, approximate="tanh").to(x.dtype)

    monkeypatch.setattr(torch, "_addmm_activation", once)
    torch.manual_seed(0)
    x, bias = torch.randn(512, 192).to(dtype), torch.randn(768).to(dtype)
    weight = (torch.randn(768, 192) * 192**-0.5).to(dtype)
    exact = linear_gelu_reference([x.double()], [weight.double()], [bias.double()])[0]
    twice = linear_gelu([x], [weight], [bias])[0]
    monkeypatch.setattr(_linear, "kernel_for", lambda *_: "cublaslt")
    fused = linear_gelu([x], [weight], [bias])[0]
    errors = [(out.double() - exact).square().mean().sqrt() for out in (fused, twice)]
    assert errors[0] < 0.8 * errors[1]
    assert (fused.double() - exact).abs().max() <= (twice.double() - exact).abs().max()


def test_the_context_manager_decides(hopper):
    x, w = [OnCuda(4096, 3072), OnCuda(50, 3072)], [OnCuda(12288, 3072)] * 2
    for choice, kernel in (("cutlass", "cutlass large"), ("cutlass small", "cutlass small"), ("torch", "torch")):
        with linear_kernels(choice):
            assert _linear.kernel_for("linear_gelu", x, w) == kernel
    with linear_kernels("cutlass"):
        assert _linear.kernel_for("linear_gelu", [OnCuda(64, 3072)], w[:1]) == "cutlass small"
        assert _linear.kernel_for("linear_gelu", [X], [W]) == "torch"
    assert _linear.kernel_for("linear_gate_residual", x, w) == "torch"  # nothing measured: the table, as before
    with pytest.raises(ValueError, match="^linear_kernels: choice must be one of table, .*, got 'fast'"):
        linear_kernels("fast").__enter__()


# ---- the launch -----------------------------------------------------------------------------------------------------


def tensor_at(address, shape, stride=None):
    """A bfloat16 tensor on someone else's memory."""
    stride = stride or (shape[1], 1) if len(shape) == 2 else (1,)
    count = sum((n - 1) * s for n, s in zip(shape, stride)) + 1 if all(shape) else 0
    memory = (ctypes.c_char * (2 * count)).from_address(address)
    flat = torch.frombuffer(memory, dtype=torch.bfloat16) if count else torch.empty(0, dtype=torch.bfloat16)
    return flat.as_strided(shape, stride)


def kernel(name, on, linears, columns, depth, tile, dtype):
    """What a launch computes, from the numbers that the compiled function gets."""
    assert dtype == 2 and tile in (0, 1)
    for x, weight, bias, out, rows, residual, gate, gate_stride, offsets, segments in linears:
        x, weight, bias = tensor_at(x, (rows, depth)), tensor_at(weight, (columns, depth)), tensor_at(bias, (columns,))
        y = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        if name == "linear_gelu_forward":
            y = torch.nn.functional.gelu(y, approximate="tanh")
        if name == "linear_gate_residual_forward":
            g = tensor_at(gate, (segments, columns), (gate_stride, 1)).float()
            bounds = None
            if offsets:
                bounds = torch.frombuffer((ctypes.c_int32 * (segments + 1)).from_address(offsets), dtype=torch.int32)
            y = tensor_at(residual, (rows, columns)).float() + _library.segment_rows(bounds, segments, rows, g) * y
        tensor_at(out, (rows, columns)).copy_(y)


@pytest.mark.parametrize(
    ("op", "shape"),
    [(QKV, (9, 3, 16, 24)), (GELU, (9, 3, 16, 24)), (GATED, (9, 3, 16, 24, 3)), (GATED, (9, 5, 16, 24, 3, True)),
     (GELU, (9, 0, 16, 24))],
    ids=["qkv", "gelu", "gate", "gate-packed", "no-text"],
)  # fmt: skip
def test_what_a_launch_is_given(op, shape, monkeypatch):
    monkeypatch.setattr(_linear, "kernel_for", lambda *_: "cutlass small")
    launches = []

    def run(name, on, *args):
        launches.append(name)
        kernel(name, on, *args)

    monkeypatch.setattr(_library, "launch", run)
    args = [a.clone() if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in op.inputs(torch.bfloat16, *shape)]
    outs, exact = harness.results(op.fn, args), harness.results(op.reference, harness.upcast(op, args))
    assert len(launches) == 1, "both streams in one launch"
    for out, e in zip(outs, exact):
        torch.testing.assert_close(out.double(), e, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "w", "error", "text"),
    [
        (torch.randn(4, 8), torch.randn(8, 8), TypeError, "dtype must be float16 or bfloat16 for the CUTLASS"),
        (torch.randn(4, 8).half(), torch.randn(6, 8).half(), ValueError, "columns must be a multiple of 8"),
        (torch.randn(4, 4).half(), torch.randn(8, 4).half(), ValueError, "depth must be a multiple of 8"),
        (torch.randn(33).half()[1:].view(4, 8), torch.randn(8, 8).half(), ValueError, "data must be aligned to 16"),
    ],
)
def test_what_the_kernels_do_not_take(x, w, error, text, monkeypatch):
    monkeypatch.setattr(_linear, "kernel_for", lambda *_: "cutlass small")
    with pytest.raises(error, match=f"^linear_gelu: {text}"):
        linear_gelu([x], [w], [torch.randn(w.shape[0]).to(x.dtype)])

"""Models and pipelines on CUDA: against the references of the ops there, and against the CPU."""

import importlib

import pytest
import torch

from qwen_image_fast import _C, QwenImagePipeline, reference
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models import side_stream
from qwen_image_fast.models.int8_linear import Int8Linear
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.ops import linear_kernels

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.build_info()["cuda_architectures"]),
    reason="needs a GPU and a build with CUDA",
)
CONFIG = {"num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 96,
          "axes_dims_rope": (8, 28, 28), "in_channels": 16, "out_channels": 4}  # fmt: skip


def run(model, dtype, inputs):
    img, txt = (t.detach().to(dtype).requires_grad_() for t in inputs)
    out = model(
        hidden_states=img, encoder_hidden_states=txt, timestep=torch.tensor([0.3, 0.8], device="cuda", dtype=dtype),
        img_shapes=[[(1, 6, 5)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    grads = torch.autograd.grad(out.float().square().mean(), [img, txt, *model.parameters()], allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformer(dtype):
    """The kernels err at most about as much as the references in the same dtype, results and all gradients."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**CONFIG).to("cuda")
    inputs = torch.randn(2, 30, 16, device="cuda"), torch.randn(2, 7, 96, device="cuda")
    with reference():
        exact = run(model.double(), torch.float64, inputs)
        theirs = run(model.to(dtype), dtype, inputs)
    ours = run(model, dtype, inputs)
    for a, b, c in zip(ours, theirs, exact):
        allowed = 3 * (b.double() - c).pow(2).mean().sqrt() + torch.finfo(dtype).eps * c.pow(2).mean().sqrt()
        assert (a.double() - c).pow(2).mean().sqrt() <= allowed


def test_text_beside_the_image(monkeypatch):
    """The same bits on one stream, and over and over: nothing races for memory. Two large samples of mixed lengths."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**CONFIG).to("cuda", torch.bfloat16).requires_grad_(False)
    img, txt = torch.randn(2, 1200, 16, device="cuda"), torch.randn(2, 70, 96, device="cuda")
    mask = torch.ones(2, 70, device="cuda")
    mask[1, 9:] = 0
    called = dict(
        hidden_states=img, encoder_hidden_states=txt, encoder_hidden_states_mask=mask,
        timestep=torch.tensor([0.3, 0.8], device="cuda"), img_shapes=[[(1, 40, 30)]] * 2, return_dict=False,
    )  # fmt: skip
    with torch.no_grad(), linear_kernels("torch"):
        results = [model(**called)[0] for _ in range(20)]
        monkeypatch.setattr(side_stream, "both", lambda main, beside, on: (main(), beside()))
        expected = model(**called)[0]
    assert all(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_layers_in_8_bits(precision):
    """Of the shipped model every such layer: the bits of the CPU, alone and where a block's layers are one launch."""
    model = QwenImageTransformer2DModel.from_pretrained(
        SHIPPED, subfolder="transformer", torch_dtype=torch.bfloat16, precision=precision
    )
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    x = [torch.randn(50, layer.in_features).bfloat16() for layer in layers]
    called = dict(
        hidden_states=torch.randn(2, 30, 64).bfloat16(), encoder_hidden_states=torch.randn(2, 7, 128).bfloat16(),
        timestep=torch.tensor([0.3, 0.8]).bfloat16(), img_shapes=[[(1, 6, 5)]] * 2, return_dict=False,
    )  # fmt: skip
    with torch.no_grad():
        expected = [layer(t) for layer, t in zip(layers, x)]
        velocity = model(**called)[0].double()
        model.to("cuda")
        assert all(torch.equal(layer(t.cuda()).cpu(), y) for layer, t, y in zip(layers, x, expected))
        there = {name: t.cuda() if torch.is_tensor(t) else t for name, t in called.items()}
        found = model(**there)[0].cpu().double()
        assert (found - velocity).norm() < 0.02 * velocity.norm()
        assert model.to("cpu")(**called)[0].double().equal(velocity)


def test_pipeline(tiny_folder):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)

    def image(device):
        noise = torch.Generator("cpu").manual_seed(0)
        run = pipe.to(device)
        images = run("a cat", height=64, width=64, num_inference_steps=3, generator=noise, output_type="pt").images
        return images[0].cpu()

    assert (image("cpu") - image("cuda")).abs().max() < 2 / 255


def test_pipeline_with_cuda_graphs(tiny_folder):
    """The same bits with and without, for other noise, another schedule and another size as well."""
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, device="cuda")
    calls = [{"seed": 1}, {"seed": 2}, {"seed": 1, "num_inference_steps": 5}, {"seed": 1, "width": 96}, {"seed": 3}]

    def latents(call):
        call = {"prompt": "a cat", "negative_prompt": " ", "height": 64, "width": 64, "num_inference_steps": 3} | call
        return pipe(**call, output_type="latent", progress=False).images.clone()

    expected = [latents(c) for c in calls]
    pipe.enable_cuda_graphs(limit=1)
    for call, image in zip(calls, expected):
        assert torch.equal(latents(call), image)


def test_one_graph_for_a_bucket_of_texts(tiny_folder):
    """Up to what cuBLASLt rounds otherwise for another number of text rows; lengths are read on the device."""
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, device="cuda", torch_dtype=torch.bfloat16)
    prompts = ["a cat", "a red circle on a green square", "a dog"]

    def latents(prompt):
        call = {"prompt": prompt, "negative_prompt": " ", "height": 64, "width": 64, "num_inference_steps": 3}
        return pipe(**call, seed=1, output_type="latent", progress=False).images.float()

    expected = [latents(p) for p in prompts]
    pipe.enable_cuda_graphs(limit=1, lengths="any")
    for prompt, image in zip(prompts, expected):
        torch.testing.assert_close(latents(prompt), image, rtol=0.05, atol=0.05)
    assert len(pipe.cuda_graphs) == 1


def test_lengths_on_the_device():
    """The same bits as lengths that Python knows, whatever the bounds: FlashAttention looks at a sample's own rows."""
    module = importlib.import_module("qwen_image_fast.ops.joint_attention")
    q, k, v = (torch.randn(300, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lens, cu = (170, 9), torch.tensor([0, 170, 179], dtype=torch.int32, device="cuda")
    expected = module.joint_attention(q[:179], k[:179], v[:179], lens, None, cu, cu)
    graph = torch.cuda.CUDAGraph()
    module.bounded_attention(q, k, v, cu, cu, 300, 300)
    with torch.cuda.graph(graph):
        out = module.bounded_attention(q, k, v, cu, cu, 300, 300)
    for first in (170, 3):
        cu.copy_(torch.tensor([0, first, 179]))
        graph.replay()
        if first == 170:
            assert torch.equal(out[:179], expected)
    expected = module.joint_attention(q[:179], k[:179], v[:179], (3, 176), None, cu, cu)
    assert torch.equal(out[:179], expected)


def test_attention_by_cudnn():
    """Dense and one sample after another, which the op tests never run: deterministic algorithms refuse cuDNN."""
    module = importlib.import_module("qwen_image_fast.ops.joint_attention")
    q, k, v = (torch.randn(3000, 24, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if module.dense_backend(q[None]).name != "CUDNN_ATTENTION":
        pytest.skip("torch does not take cuDNN's attention here")
    for lens, kernel in (((1500, 1500), "dense"), ((1450, 1550), "loop")):
        assert module.attention_kernel(q, lens, lens) == kernel
        out = module.joint_attention(q, k, v, lens)
        exact = module.joint_attention_reference(*(t.double() for t in (q, k, v)), lens)
        theirs = module.joint_attention_reference(q, k, v, lens)
        assert (out - exact).abs().max() <= 2 * (theirs - exact).abs().max() + torch.finfo(
            out.dtype
        ).eps * exact.abs().max()


def test_drop_in_with_cuda_graphs(tiny_folder):
    """Both branches of guidance by one graph of a bucket, the second not over the first."""
    diffusers = pytest.importorskip("diffusers")
    from qwen_image_fast import accelerate

    pipe = diffusers.QwenImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)

    def latents():
        return pipe(
            prompt="a cat", negative_prompt=" ", true_cfg_scale=4.0, height=64, width=64, num_inference_steps=3,
            generator=torch.Generator().manual_seed(1), output_type="latent",
        ).images.float()  # fmt: skip

    accelerate(pipe)
    expected = latents()
    assert accelerate(pipe, cuda_graphs=True)
    for _ in range(2):
        torch.testing.assert_close(latents(), expected, rtol=0.05, atol=0.05)
    assert len(pipe.transformer.cuda_graphs) >= 1


def test_ops_in_a_cuda_graph():
    """Nothing in the compiled core allocates, synchronises or keeps state."""
    from qwen_image_fast.ops import layer_norm_modulate

    x, v = torch.randn(64, 128, device="cuda"), torch.randn(1, 128, device="cuda")
    expected = layer_norm_modulate(x, v, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer_norm_modulate(x, v, v)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("own", [False, True])
def test_mixed_lengths_in_a_cuda_graph(monkeypatch, own):
    """Torch's kernel with offsets on the device, and that of this package, whose offsets are launch parameters."""
    module = importlib.import_module("qwen_image_fast.ops.joint_attention")
    if module.varlen_attn is None and not own:
        pytest.skip("this torch has no kernel for mixed lengths")
    if own:
        monkeypatch.setattr(module, "varlen_attn", None)
    q, k, v = (torch.randn(15, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, 12, 15], dtype=torch.int32, device="cuda")
    assert module.attention_kernel(q, (12, 3), (12, 3)) == ("packed" if own else "varlen")
    expected = module.joint_attention(q, k, v, (12, 3), None, cu, cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.joint_attention(q, k, v, (12, 3), None, cu, cu)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_a_side_stream():
    from qwen_image_fast.ops import gelu_tanh

    x = torch.randn(1 << 20, device="cuda")
    expected = gelu_tanh(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = gelu_tanh(x)
    stream.synchronize()
    assert torch.equal(out, expected)

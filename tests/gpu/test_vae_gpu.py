"""The VAE on CUDA: fused norm, folded upsampling, convolutions by cuDNN and by CUTLASS, strips."""

import sys

import pytest
import torch

from qwen_image_fast import _C
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.ops import conv2d

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.build_info()["cuda_architectures"]),
    reason="needs a GPU and a build with CUDA",
)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """cuDNN's convolutions in float32 round their inputs to TF32 otherwise, 10 bits, as torch lets them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def outputs(vae, x, z):
    with torch.no_grad():
        return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["torch", "cutlass"])
def test_as_on_the_cpu(dtype, kernel, monkeypatch):
    """Against float64 on the CPU, at most three times the error that the CPU makes in this dtype."""
    if kernel == "cutlass":
        if dtype == torch.float32:
            pytest.skip("the CUTLASS kernel takes 16 bit")
        shapes = {(c, d, k) for c in (32, 64, 128) for d in (32, 64, 128, 256) for k in (1, 2, 3)}
        # The module: the package's attribute of this name is the function.
        monkeypatch.setattr(sys.modules[conv2d.__module__], "FASTER_THAN_CUDNN", frozenset(shapes))
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=32, num_res_blocks=1).eval()
    x, z = torch.rand(1, 3, 1, 72, 40) * 2 - 1, torch.randn(1, 16, 1, 9, 5)
    exact = outputs(vae.double(), x.double(), z.double())
    cpu = outputs(vae.to(dtype), x.to(dtype), z.to(dtype))
    gpu = outputs(vae.to("cuda"), x.to("cuda", dtype), z.to("cuda", dtype))
    for a, b, c in zip(gpu, cpu, exact):
        allowed = 3 * (b.double() - c).square().mean().sqrt() + torch.finfo(dtype).eps * c.square().mean().sqrt()
        assert (a.cpu().double() - c).square().mean().sqrt() <= allowed
    vae.set_memory_limit("70MB")
    for a, b in zip(outputs(vae, x.to("cuda", dtype), z.to("cuda", dtype)), gpu):
        assert (a - b).abs().max() <= 64 * torch.finfo(dtype).eps * b.abs().max()


def test_a_residual_in_the_kernel_is_rounded_once():
    args = torch.randn(1, 20, 21, 96), torch.randn(96, 96, 3, 3) / 30, torch.randn(96), torch.randn(1, 20, 21, 96)
    args = [t.to("cuda", torch.bfloat16) for t in args]
    exact = conv2d(*(t.double().cpu() for t in args), kernel="torch")
    errors = [(conv2d(*args, kernel=k).cpu().double() - exact).square().mean() for k in ("cutlass", "torch")]
    assert errors[0] < errors[1]

"""Gradients through layers in 8 bits, and the layers where there are no kernels."""

import pytest
import torch
import torch.nn.functional as F
from test_int8_linear import distance, inputs

from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.ops import _int8


def layer_of(columns, depth, dtype, bias=True):
    g = torch.Generator().manual_seed(columns + depth)
    weight = torch.randn(columns, depth, generator=g) / depth**0.5
    own = torch.nn.Parameter(torch.randn(columns, generator=g).to(dtype)) if bias else None
    return Int8Linear(quantised(weight), own), torch.randn(2, 5, depth, generator=g).to(dtype)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("columns, depth, bias", [(192, 256, True), (33, 96, True), (64, 1024, False)])
def test_gradients_are_those_of_the_dequantised_weight(columns, depth, bias, dtype, most):
    layer, x = layer_of(columns, depth, dtype, bias)
    with torch.no_grad():
        expected = layer(x)
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y, expected)  # the same product as without
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(grad)
    assert x.grad.dtype == dtype and distance(x.grad, grad.double() @ layer.dequantised().double()) < most
    if bias:
        assert distance(layer.bias.grad, grad.double().sum((0, 1))) < most


def test_nothing_is_kept_for_the_backward_pass():
    layer, x = layer_of(256, 512, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x.requires_grad_()).sum()
    assert not kept


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=["float32", "bfloat16"])
def test_without_kernels_it_is_the_dequantised_product(dtype, most):
    layer, x = layer_of(192, 256, dtype)
    exact = F.linear(x.double(), layer.dequantised().double(), layer.bias.double())
    assert distance(layer.in_floats(x, layer.bias), exact) < most
    rows = layer.int8._replace(packed=_int8.filled_up(layer.int8.values()))  # as it lies on a GPU
    assert rows.packed.shape == (192, 256) and torch.equal(rows.laid_out().packed, layer.int8.packed)
    torch.testing.assert_close(Int8Linear(rows, layer.bias).in_floats(x, layer.bias), layer.in_floats(x, layer.bias))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_has_the_gradients_of_its_floats(tmp_path, checkpointing):
    """Of the text states, through all blocks: those of the weights decoded, but for the rounding of activations, an
    eighth of them at inputs that fit no prompt; of gradients that had nothing in common more than all would be off."""
    small = QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", precision="int8")
    small.save_pretrained(tmp_path)
    floats = QwenImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    found = []
    for model in (small.to(torch.float32), floats):
        model.requires_grad_(False).gradient_checkpointing = checkpointing
        given = inputs()
        text = given["encoder_hidden_states"].requires_grad_()
        model(**given).sample.square().mean().backward()
        found.append(text.grad)
    assert 0 < distance(*found) < 0.25

"""A small model, ours and diffusers', for the tests of folders of weights."""

from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from qwen_image_fast.models.base import PretrainedModel, record_config

BASE = "diffusion_pytorch_model"


def build(self, width, layers, with_bias):
    self.blocks = nn.ModuleList(nn.Linear(width, width, bias=with_bias) for _ in range(layers))
    self.norm = nn.LayerNorm(width)
    self.register_buffer("steps", torch.arange(3))
    self.register_buffer("table", torch.arange(width, device="cpu") * 0.5, persistent=False)


class Toy(PretrainedModel):
    @record_config
    def __init__(self, width: int = 8, layers: int = 3, sizes: tuple = (1, 2), with_bias: bool = True):
        super().__init__()
        build(self, width, layers, with_bias)


class Reference:
    """Diffusers' own reading and writing of the same model."""

    class Toy(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 8, layers: int = 3, sizes: tuple = (1, 2), with_bias: bool = True):
            super().__init__()
            build(self, width, layers, with_bias)


def new_toy():
    torch.manual_seed(0)
    return Toy(width=16, layers=5)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def assert_same(a, b):
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name

"""The fused operations of Qwen-Image, forward and backward. One file each, named after the op."""

from qwen_image_fast.ops._choices import keeping_choices, linear_kernels, reference
from qwen_image_fast.ops._eight_bits import eight_bits
from qwen_image_fast.ops._library import has_kernels
from qwen_image_fast.ops.channel_norm_silu import channel_norm_silu
from qwen_image_fast.ops.conv2d import conv2d
from qwen_image_fast.ops.conv3x3 import conv3x3, pack_conv3x3
from qwen_image_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from qwen_image_fast.ops.gelu_tanh import gelu_tanh
from qwen_image_fast.ops.guided_step import guided_step
from qwen_image_fast.ops.int8_rows import int8_rows
from qwen_image_fast.ops.joint_attention import joint_attention
from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate
from qwen_image_fast.ops.linear_amx import linear_amx
from qwen_image_fast.ops.linear_gate_residual import linear_gate_residual
from qwen_image_fast.ops.linear_gelu import linear_gelu
from qwen_image_fast.ops.linear_int8 import Int8Weight, int8_kernels, int8_unit, linear_int8
from qwen_image_fast.ops.linear_qkv import linear_qkv
from qwen_image_fast.ops.picture_statistics import PictureStatistics, picture_statistics
from qwen_image_fast.ops.qk_norm_rope import qk_norm_rope

__all__ = [
    "Int8Weight",
    "PictureStatistics",
    "channel_norm_silu",
    "conv2d",
    "conv3x3",
    "eight_bits",
    "gate_residual_norm_modulate",
    "gelu_tanh",
    "guided_step",
    "has_kernels",
    "int8_kernels",
    "int8_rows",
    "int8_unit",
    "joint_attention",
    "keeping_choices",
    "layer_norm_modulate",
    "linear_amx",
    "linear_gate_residual",
    "linear_gelu",
    "linear_int8",
    "linear_kernels",
    "linear_qkv",
    "pack_conv3x3",
    "picture_statistics",
    "qk_norm_rope",
    "reference",
]

"""A model of two narrow blocks and short runs on coloured squares, shared by the tests of the trainer."""

import json

import torch

from qwen_image_fast import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from qwen_image_fast.tiny import tiny_configs, write_untrained
from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.recipe.fields import set_dotted
from qwen_image_fast.training.recipe.read import build
from qwen_image_fast.training.tasks.flow import FlowTask
from qwen_image_fast.training.tasks.vae import initialise

SMALL = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [4, 6, 6]}


def small_transformer(seed=0, **changes):
    """Two blocks of width 32, every weight random, so that every gradient matters."""
    config = {**tiny_configs()["transformer"], **SMALL, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QwenImageTransformer2DModel(**config)


def small_folder(folder):
    """The tiny pipeline with the small transformer and a small VAE whose latents depend on the image."""
    write_untrained(folder, edit=True)
    small_transformer().save_pretrained(folder / "transformer")
    vae = AutoencoderKLQwenImage(**{**tiny_configs()["vae"], "base_dim": 4})
    initialise(vae, 0)
    vae.save_pretrained(folder / "vae")
    return folder


def small_tree(folder):
    """32-pixel squares, four to a step."""
    return {
        "steps": 4, "batch": 4, "device": "cpu",
        "model": {"folder": str(folder)},
        "data": {"source": "squares", "options": {"size": 32}, "buckets": [[32, 32]]},
        "optimizer": {"lr": 2e-3},
        "checkpoint": {"every": 2},
        "log": {"every": 1, "sample_steps": 2, "validation_samples": 2},
    }  # fmt: skip


def small_recipe(folder, /, **changes):
    """`small_tree`; `changes` are fields with "__" for the dot, None takes one out."""
    tree = small_tree(folder)
    for name, value in changes.items():
        set_dotted(tree, name.replace("__", "."), value)
    return build({name: value for name, value in tree.items() if value is not None})


def start(recipe, folder, source=None, **options):
    return Trainer(recipe, FlowTask(recipe, folder, source), folder, **options)


def log_of(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(trainer):
    return {name: w.detach().clone() for name, w in trainer.optimizer.masters.items()}

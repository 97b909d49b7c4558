"""diffusers' pipelines over the tiny model, and pictures to give them."""

import importlib
from importlib.util import find_spec

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLForConditionalGeneration

try:  # the slow image processor, which needs no torchvision; its name in transformers 5
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import Qwen2VLImageProcessor as ImageProcessor

IMAGE = "<|image_pad|>"
AREA = 128 * 128  # what the fixture `small` puts in the place of a megapixel


class Processor:
    """transformers' Qwen2VLProcessor without its video part, which needs torchvision."""

    def __init__(self, tokenizer, folder):
        self.tokenizer, self.image_processor = tokenizer, ImageProcessor.from_pretrained(folder)

    def __call__(self, text, images=None, padding=True, return_tensors="pt"):
        pictures = {} if images is None else self.image_processor(images, return_tensors="pt")
        counts = iter([] if images is None else (pictures["image_grid_thw"].prod(1) // 4).tolist())
        pieces = [t.split(IMAGE) for t in ([text] if isinstance(text, str) else text)]
        text = [p[0] + "".join(IMAGE * next(counts) + rest for rest in p[1:]) for p in pieces]
        tokens = self.tokenizer(text, padding=padding, return_tensors="pt")
        kinds = (tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE)).int()
        return BatchFeature({**tokens, "mm_token_type_ids": kinds, **pictures})

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def name_picture_tokens(module, args, kwargs):
    """Without these ids transformers 5 gives pictures consecutive positions (huggingface/diffusers#14194)."""
    ids = (kwargs["input_ids"] == module.config.image_token_id).int()
    return args, kwargs | {"mm_token_type_ids": ids}


def reference(name, folder, dtype=torch.float32, grid_positions=True, **components):
    """diffusers' pipeline `name` of the tiny folder, with positions as the model was trained or as they are now."""
    base = diffusers.QwenImagePipeline.from_pretrained(folder, dtype=dtype)
    parts = {**base.components, **components}
    parts["text_encoder"] = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype)
    if grid_positions:
        parts["text_encoder"].register_forward_pre_hook(name_picture_tokens, with_kwargs=True)
    if "Edit" in name or "Layered" in name:
        parts["processor"] = Processor(parts["tokenizer"], folder / "processor")
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width, height, seed=0):
    """Smooth colours with a hard edge."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(small).copy()
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def smaller_sizes(patch):
    """The sizes to which diffusers' pipelines and ours bring pictures, 64 times smaller."""
    for name in ("edit", "edit_plus", "edit_inpaint", "layered"):
        module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
        full = module.calculate_dimensions
        patch.setattr(module, "calculate_dimensions", lambda area, ratio, full=full: full(area / 64, ratio))
    for name in ("conditions", "editing", "edit_inpaint"):
        if find_spec(f"qwen_image_fast.pipelines.{name}"):  # not in an older tree, with which calls are counted
            patch.setattr(f"qwen_image_fast.pipelines.{name}.VAE_AREA", AREA)
    layered = importlib.import_module("qwen_image_fast.pipelines.layered")
    own = layered.area_size
    patch.setattr(layered, "area_size", lambda area, w, h: own(area / 64, w, h))


def take_mode(pipe):
    """The VAE returns the mode of its latents where a pipeline would draw them."""
    encode = pipe.vae.encode

    def encode_mode(*args, **kwargs):
        out = encode(*args, **kwargs)
        out.latent_dist.sample = lambda generator=None: out.latent_dist.mode()
        return out

    pipe.vae.encode = encode_mode


def assert_errs_at_most_twice_as_much(ours, theirs, truth):
    """In RMS and in the largest error, of latents in 16 bits against those in float64."""
    a, b = ours.double() - truth, theirs.double() - truth
    assert ours.dtype == theirs.dtype != torch.float32 and b.abs().max() > 0
    assert a.pow(2).mean().sqrt() <= 2 * b.pow(2).mean().sqrt() and a.abs().max() <= 2 * b.abs().max()


def seeded(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]

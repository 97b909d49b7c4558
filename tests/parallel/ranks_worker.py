"""A process of several: `python ranks_worker.py SPLIT ...` makes things with the others and alone, and compares them.

Prints a JSON object of the name of each check and the largest relative difference that it found.
"""

import functools
import json
import sys

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import qwen_image_fast as q
from qwen_image_fast.models.packing import pack
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.parallel.ranks import Ranks, start_ranks

LONG = ["a red circle on the left of a blue square, and behind them a green triangle on a black background, with a "
        "white star above", "the text \"OK\" in the center, on a green background, with a small yellow circle below it "
        "and a grey star above it"]  # fmt: skip
NEGATIVE = "a dark picture of bad quality, with text that nobody can read, and with shapes that are not what they are"
CONFIG = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 24,
          "axes_dims_rope": (4, 6, 6)}  # fmt: skip
SHAPES = (((1, 5, 3),), ((1, 4, 7), (1, 2, 3)), ((1, 3, 3), (1, 4, 4), (1, 1, 1)), ((1, 9, 2),))
TEXTS = (7, 11, 1, 4)


def small(**changes):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**CONFIG, **changes).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model


def difference(one, other):
    assert one.shape == other.shape and one.dtype == other.dtype
    return 0.0 if torch.equal(one, other) else float((one - other).abs().max() / other.abs().max())


def counted(model, rows, img, *more):
    """`forward_alone`, whose number of rows is noted."""
    rows.append(len(img))
    return type(model).forward_alone(model, img, *more)


def forwards(parallel):
    """Batches of mixed sizes, with references, conditions of each sample, residuals, and a modulation at 0."""
    found = {}
    for zero in (False, True):
        model = small(zero_cond_t=zero)
        ranks = start_ranks("test", parallel, model, 60)
        for case in ("one", "mixed", "targets", "residuals"):
            shapes, texts = (SHAPES[:1], TEXTS[:1]) if case == "one" else (SHAPES, TEXTS)
            layout = pack(
                shapes, texts, axes_dim=CONFIG["axes_dims_rope"], zero_cond_t=zero,
                targets=[1] * len(shapes) if case == "targets" else None,
            )  # fmt: skip
            torch.manual_seed(3)
            img, txt = torch.randn(sum(layout.img_lens), 64), torch.randn(sum(texts), 64)
            levels = torch.linspace(0.2, 0.9, len(shapes))
            modulation = model.sample_modulation(levels if zero or case != "mixed" else levels[:1])
            added = [torch.randn(len(img), 64)] if case == "residuals" else None
            inputs = img, txt, layout, modulation, added
            alone = model.forward_alone(*inputs)
            rows = []
            model.ranks, model.forward_alone = ranks, functools.partial(counted, model, rows)
            found[f"{case}{' at zero' * zero}"] = difference(model.forward_packed(*inputs), alone)
            model.ranks = None
            del model.forward_alone
            assert sum(ranks.gather(sum(rows))) == len(img)  # of all ranks together, each row once
    return found


def picture(width, height):
    image = Image.new("RGB", (width, height), (200, 220, 240))
    ImageDraw.Draw(image).ellipse((4, 6, width // 2, height - 8), fill=(200, 40, 40))
    return image


def latents(pipe, **call):
    found = pipe(**call, num_inference_steps=3, output_type="latent", progress=False).images
    return torch.cat([x.flatten() for x in (found if isinstance(found, list) else [found])])


def fails_at(tile, number):
    if tile == number:
        raise ValueError(f"tile {number} failed")
    return tile


def pipelines(parallel):
    """Pictures with guidance of two sizes, without guidance, edits, tiles; what differs between the processes."""
    rank, found = dist.get_rank(), {}
    edit = q.QwenImageEditPlusPipeline.from_pretrained("tiny", torch_dtype=torch.float32)
    text = q.QwenImagePipeline.from_pipe(edit)
    calls = {
        "guided": (text, {"prompt": LONG, "negative_prompt": [NEGATIVE] * 2, "true_cfg_scale": 3.0, "seed": 5,
                          "height": [80, 64], "width": [48, 96]}),
        "unguided": (text, {"prompt": LONG[0], "true_cfg_scale": 1.0, "seed": 6, "height": 80, "width": 48}),
        "edit": (edit, {"image": [picture(96, 64), picture(64, 64)], "prompt": LONG[0], "negative_prompt": NEGATIVE,
                        "true_cfg_scale": 3.0, "seed": 7}),
    }  # fmt: skip
    edit.vae.enable_tiling(64, 64, 48, 48)
    alone = {name: latents(pipe, **call) for name, (pipe, call) in calls.items()}
    torch.manual_seed(1)
    z = torch.randn(1, 16, 1, 21, 13)
    tiled = edit.vae.decode(z).sample
    encoded = edit.vae.encode(tiled.clamp(-1, 1)).latent_dist.mean
    text.enable_parallel(parallel, timeout=60)
    assert isinstance(edit.transformer.ranks, Ranks)
    for name, (pipe, call) in calls.items():
        found[name] = difference(latents(pipe, **call), alone[name])
    found["tiles"] = difference(edit.vae.decode(z).sample, tiled)
    found["tiles of an encoder"] = difference(edit.vae.encode(tiled.clamp(-1, 1)).latent_dist.mean, encoded)
    seeds = text.transformer.ranks.gather(
        text(LONG[0], num_inference_steps=1, height=32, width=32, progress=False).seeds
    )
    assert seeds == [seeds[0]] * len(seeds)
    for other in ({"seed": rank}, {"seed": 1, "height": 64 + 16 * rank, "width": 64}, {"seed": 1, "steps": 1 + rank}):
        steps = other.pop("steps", 1)
        try:
            text(LONG[0], num_inference_steps=steps, progress=False, **{"height": 64, "width": 64} | other)
            raise AssertionError(f"{other} was taken")
        except ValueError as error:
            assert "processes must be asked for the same pictures" in str(error), error
    for broken in range(3):  # on whichever process it is computed, all are told
        try:
            edit.vae.ranks.each(
                functools.partial(fails_at, number=broken), [torch.full((1,), float(k)) for k in range(3)]
            )
            raise AssertionError("a tile that failed was taken")
        except ValueError as error:
            assert str(error) == f"tile {broken} failed", error
    text.disable_parallel()
    assert torch.equal(latents(text, **calls["unguided"][1]), alone["unguided"])
    return found


def drop_in(parallel):
    """diffusers' pipeline, accelerated alone and with the others."""
    from diffusers import QwenImagePipeline

    from qwen_image_fast.folders import SHIPPED

    found = {}

    def made(**call):
        generator = torch.Generator().manual_seed(3)
        return pipe(
            height=80, width=48, num_inference_steps=4, generator=generator, output_type="latent", **call
        ).images

    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    q.accelerate(pipe)
    calls = {
        "guided": {"prompt": LONG, "negative_prompt": [NEGATIVE] * 2, "true_cfg_scale": 3.0},
        "unguided": {"prompt": LONG[0], "true_cfg_scale": 1.0},
    }
    alone = {name: made(**call) for name, call in calls.items()}
    torch.manual_seed(1)
    z = torch.randn(1, 16, 1, 21, 13)
    pipe.vae.enable_tiling(64, 64, 48, 48)
    tiled = pipe.vae.decode(z).sample
    encoded = pipe.vae.encode(tiled.clamp(-1, 1)).latent_dist.mean
    report = q.accelerate(pipe, parallel=parallel)
    assert f"{dist.get_world_size()} processes share a forward" in str(report), report
    for name, call in calls.items():
        found[name] = difference(made(**call), alone[name])
    found["guided again"] = difference(made(**calls["guided"]), alone["guided"])
    found["tiles"] = difference(pipe.vae.decode(z).sample, tiled)
    found["tiles of an encoder"] = difference(pipe.vae.encode(tiled.clamp(-1, 1)).latent_dist.mean, encoded)
    try:
        pipe(
            LONG[0],
            height=64,
            width=64,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(dist.get_rank()),
        )
        raise AssertionError("other noise was taken")
    except ValueError as error:
        assert "their noise differ" in str(error), error
    q.restore(pipe)
    assert pipe.transformer.__dict__.get("ranks") is None
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        for parallel in sys.argv[1:]:
            for check in (forwards, pipelines, drop_in):
                numbers = {f"{check.__name__}: {name}": value for name, value in check(parallel).items()}
                assert all(np.isfinite(list(numbers.values()))), numbers
                print(json.dumps({parallel: numbers}), flush=True)
    dist.destroy_process_group()

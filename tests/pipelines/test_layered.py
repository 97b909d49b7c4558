"""The Layered pipeline against diffusers' with the same weights and seed."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from reference import assert_errs_at_most_twice_as_much, picture, reference, seeded

import qwen_image_fast
from qwen_image_fast import QwenImageLayeredPipeline
from qwen_image_fast.models import text_encoder
from qwen_image_fast.pipelines.images import area_size
from qwen_image_fast.tiny import tiny_configs

PROMPT = "a cat on a table"


def rgba(width, height, seed=0):
    image = picture(width, height, seed).convert("RGBA")
    image.putalpha(picture(width, height, seed + 9).convert("L"))
    return image


def models(dtype=torch.float32):
    """Ours and diffusers' transformer and VAE with the Layered flags and the same random weights."""
    torch.manual_seed(0)
    parts = {}
    flags = {"use_additional_t_cond": True, "use_layer3d_rope": True}
    configs = tiny_configs()
    for name, cls, config in (
        ("transformer", "QwenImageTransformer2DModel", {**configs["transformer"], **flags, "num_layers": 2}),
        ("vae", "AutoencoderKLQwenImage", {**configs["vae"], "input_channels": 4}),
    ):
        mine = getattr(qwen_image_fast, cls)(**config).eval()
        theirs = getattr(diffusers, cls)(**config).eval()
        theirs.load_state_dict(mine.state_dict())
        parts[name] = (mine.to(dtype), theirs.to(dtype))
    return parts


def load(folder, dtype=torch.float32):
    parts = models(dtype)
    mine = QwenImageLayeredPipeline.from_pretrained(folder, torch_dtype=dtype, **{k: v[0] for k, v in parts.items()})
    return mine, reference("QwenImageLayeredPipeline", folder, dtype, **{k: v[1] for k, v in parts.items()})


@pytest.fixture(scope="module")
def pair(edit_folder, small):
    return load(edit_folder)


def ours(pipe, **call):
    return pipe(**{"num_inference_steps": 2, "output_type": "latent", "progress": False, **call}).images


def theirs(pipe, **call):
    """The last latents of diffusers' pipeline, which cannot return them, or what it makes of them."""
    seen = []
    images = pipe(
        num_inference_steps=2, callback_on_step_end=lambda pipe, i, t, kw: seen.append(kw["latents"]) or {},
        **{"output_type": "np", **call},
    ).images  # fmt: skip
    return images if "output_type" in call else seen[-1]


CALLS = {
    "square": ((64, 64), {"layers": 3}),
    "wide": ((120, 50), {"layers": 2, "negative_prompt": "bad"}),
    "tall": ((37, 61), {"layers": 1, "negative_prompt": "bad", "cfg_normalize": True}),
}


@pytest.mark.parametrize(("size", "call"), CALLS.values(), ids=CALLS.keys())
def test_latents_equal_diffusers(pair, size, call):
    call = {"image": rgba(*size), "prompt": PROMPT, **call}
    expected = theirs(pair[1], **call, generator=seeded(7))
    torch.testing.assert_close(ours(pair[0], **call, seed=7), expected, rtol=0, atol=5e-5)


def test_layers_equal_diffusers(pair):
    call = {"image": rgba(64, 48), "prompt": PROMPT, "layers": 2, "output_type": "pil"}
    (expected,) = theirs(pair[1], **call, generator=seeded(7))
    (got,) = ours(pair[0], **call, seed=7)
    assert len(got) == len(expected) == 2 and got[0].mode == "RGBA"
    for a, b in zip(got, expected):
        assert np.abs(np.int16(a) - np.int16(b)).max() <= 1


def test_bfloat16_errs_at_most_twice_as_much(edit_folder, small):
    (mine, half), (_, exact) = load(edit_folder, torch.bfloat16), load(edit_folder, torch.bfloat16)
    for module in exact.components.values():
        if isinstance(module, torch.nn.Module):
            module.double()
    for seed, size in enumerate(((64, 64), (120, 50), (37, 61))):
        width, height = area_size(640 * 640 / 64, *size)
        tokens = 3 * (width // 16) * (height // 16)
        noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        call = {"image": rgba(*size, seed), "prompt": PROMPT, "layers": 2, "latents": noise, "negative_prompt": "bad"}
        assert_errs_at_most_twice_as_much(ours(mine, **call), theirs(half, **call), theirs(exact, **call))


def test_a_batch_equals_single_runs_and_keeps_sizes(pair):
    images, call = [rgba(64, 48), rgba(33, 50, 1)], {"layers": 2, "negative_prompt": "bad", "preserve_size": True}
    batch = ours(pair[0], image=images, prompt=[PROMPT, "a dog"], seed=[5, 6], output_type="np", **call)
    others = [images[0], rgba(33, 50, 2)]
    again = ours(pair[0], image=others, prompt=[PROMPT, "a cow"], seed=[5, 7], output_type="np", **call)
    assert np.array_equal(again[0], batch[0]) and not np.array_equal(again[1], batch[1])
    for k, image in enumerate(images):
        (alone,) = ours(pair[0], image=image, prompt=[PROMPT, "a dog"][k], seed=5 + k, output_type="np", **call)
        assert len(batch[k]) == 2 and batch[k][0].shape == (*image.size[::-1], 4)
        assert max(np.abs(a - b).max() for a, b in zip(alone, batch[k])) < 1e-4


@pytest.mark.parametrize("english", [True, False])
def test_captions_equal_diffusers(pair, english, monkeypatch):
    mine, theirs_pipe = pair
    prompt = text_encoder.CAPTION_ENGLISH if english else text_encoder.CAPTION_CHINESE
    assert prompt == (theirs_pipe.image_caption_prompt_en if english else theirs_pipe.image_caption_prompt_cn)
    for pipe in pair:  # short answers; untrained weights never end one
        generate = type(pipe.text_encoder).generate
        monkeypatch.setattr(
            pipe.text_encoder, "generate", lambda generate=generate, self=pipe.text_encoder, **kw: generate(
                self, **{**kw, "max_new_tokens": 8, "do_sample": False}
            ),
        )  # fmt: skip
    image = picture(64, 48)
    with torch.no_grad():
        expected = theirs_pipe.get_image_caption(image, use_en_prompt=english, device="cpu")
        assert mine.get_image_caption(image, use_en_prompt=english) == expected
    seen = []
    monkeypatch.setattr(mine, "_texts", lambda request, *a: seen.append(request.prompt) or stop())
    with pytest.raises(KeyboardInterrupt):
        ours(mine, image=image, use_en_prompt=english)
    assert len(seen[0]) == 1 and seen[0][0]


def stop():
    raise KeyboardInterrupt


def test_errors(pair, edit_folder):
    call = {"image": rgba(64, 64), "prompt": PROMPT}
    with pytest.raises(ValueError, match="resolution must be 640 or 1024, got 512"):
        ours(pair[0], **call, resolution=512)
    with pytest.raises(ValueError, match="layers must be an integer of at least 1, got 0"):
        ours(pair[0], **call, layers=0)
    with pytest.raises(ValueError, match="image must be given, got None"):
        ours(pair[0], prompt=PROMPT)
    plain = QwenImageLayeredPipeline.from_pretrained(
        edit_folder, text_encoder=text_encoder.load_text_encoder(edit_folder / "text_encoder")
    )
    with pytest.raises(ValueError, match="text_encoder must have its language-model head"):
        plain.get_image_caption(Image.new("RGB", (32, 32)))

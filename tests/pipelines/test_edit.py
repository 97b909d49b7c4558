"""Edit and Edit-Plus against diffusers' pipelines with the same folder and seed, and what only ours can do."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference import AREA, Processor, assert_errs_at_most_twice_as_much, picture, reference, seeded

import qwen_image_fast
from qwen_image_fast import LocalEnhancer, QwenImageEditPipeline, QwenImageEditPlusPipeline
from qwen_image_fast.models.text_encoder import load_captioner
from qwen_image_fast.pipelines import conditions
from qwen_image_fast.pipelines.conditions import encode_edit_prompts
from qwen_image_fast.pipelines.prompt_enhancer import POLISH

NAMES = ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"]
PROMPT = "turn the sky blue"


@pytest.fixture(scope="module", params=NAMES)
def pair(request, edit_folder, small):
    ours = getattr(qwen_image_fast, request.param).from_pretrained(edit_folder)
    return ours, reference(request.param, edit_folder)


def theirs(pipe, *args, **kwargs):
    return pipe(*args, **{"output_type": "latent", "num_inference_steps": 2, **kwargs}).images


def like_diffusers(pipe, *args, **kwargs):
    area = 48 * 48 if pipe.plus else AREA
    return ours(pipe, *args, **{"preserve_size": False, "condition_area": area, **kwargs})


def ours(pipe, *args, **kwargs):
    return pipe(*args, progress=False, **{"output_type": "latent", "num_inference_steps": 2, **kwargs}).images


SIZES = [(64, 64), (120, 40), (48, 112), (61, 37)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_latents_equal_diffusers(pair, size):
    call = {"image": picture(*size), "prompt": PROMPT, "negative_prompt": "blurry and dark"}
    expected = theirs(pair[1], **call, generator=seeded(7))
    got = like_diffusers(pair[0], **call, seed=7)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_no_guidance_size_and_several_images(pair):
    call = {"image": picture(64, 48), "prompt": PROMPT, "height": 70, "width": 96, "num_images_per_prompt": 2}
    expected = theirs(pair[1], **call, generator=seeded(1, 2))
    torch.testing.assert_close(like_diffusers(pair[0], **call, seed=1), expected, rtol=0, atol=5e-5)


def test_images_equal_diffusers(pair):
    call = {"image": picture(61, 37), "prompt": PROMPT, "negative_prompt": " ", "output_type": "np"}
    expected = theirs(pair[1], **call, generator=seeded(3))
    got = like_diffusers(pair[0], **call, seed=3)
    assert got[0].shape == expected[0].shape and np.abs(got[0] - expected[0]).max() < 1 / 255


def test_embeddings_in(edit_folder, small):
    """Of both prompts, or of one: then the other is encoded with the picture."""
    theirs_pipe = reference("QwenImageEditPipeline", edit_folder)
    pipe = QwenImageEditPipeline.from_pretrained(edit_folder)
    torch.manual_seed(0)
    given = {"prompt_embeds": torch.randn(1, 6, 128)}
    for negative in ({"negative_prompt_embeds": torch.randn(1, 3, 128)}, {"negative_prompt": "bad"}):
        call = {"image": picture(64, 48), **given, **negative}
        expected = theirs(theirs_pipe, **call, generator=seeded(7))
        torch.testing.assert_close(like_diffusers(pipe, **call, seed=7), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("references", [2, 3])
def test_several_references_equal_diffusers(edit_folder, small, references):
    images = [picture(*SIZES[k], seed=k) for k in range(references)]
    call = {"image": images, "prompt": PROMPT, "negative_prompt": " "}
    expected = theirs(reference("QwenImageEditPlusPipeline", edit_folder), **call, generator=seeded(7))
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    torch.testing.assert_close(like_diffusers(pipe, **call, seed=7), expected, rtol=0, atol=5e-5)


def test_consecutive_positions_equal_diffusers_with_transformers_5(edit_folder, small):
    """What an installation of both gives today; the trained positions give another image."""
    call = {"image": picture(64, 64), "prompt": PROMPT}
    expected = theirs(
        reference("QwenImageEditPipeline", edit_folder, grid_positions=False), **call, generator=seeded(7)
    )
    pipe = QwenImageEditPipeline.from_pretrained(edit_folder)
    got = like_diffusers(pipe, **call, seed=7, grid_positions=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)
    assert (like_diffusers(pipe, **call, seed=7) - got).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_reference_rows_of_zero_cond_t(edit_folder, small, name):
    """Edit-2511: references are modulated at t = 0."""
    import diffusers

    config = {**qwen_image_fast.tiny.tiny_configs()["transformer"], "zero_cond_t": True}
    pipe = getattr(qwen_image_fast, name).from_pretrained(edit_folder)
    transformer = qwen_image_fast.QwenImageTransformer2DModel(**config)
    transformer.load_state_dict(pipe.transformer.state_dict())
    pipe.transformer = transformer.eval()
    theirs_transformer = diffusers.QwenImageTransformer2DModel(**config).eval()
    theirs_transformer.load_state_dict(transformer.state_dict())
    call = {"image": picture(48, 64), "prompt": PROMPT, "negative_prompt": " "}
    expected = theirs(reference(name, edit_folder, transformer=theirs_transformer), **call, generator=seeded(7))
    torch.testing.assert_close(like_diffusers(pipe, **call, seed=7), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_errs_at_most_twice_as_much(edit_folder, small, name):
    ours_half = getattr(qwen_image_fast, name).from_pretrained(edit_folder, torch_dtype=torch.bfloat16)
    exact, half = reference(name, edit_folder, torch.float64), reference(name, edit_folder, torch.bfloat16)
    for seed, (width, height) in enumerate(SIZES):
        call = {"image": picture(width, height, seed), "prompt": PROMPT, "negative_prompt": "bad"}
        call |= {"height": 2 * height, "width": 2 * width}
        tokens = (2 * height // 16) * (2 * width // 16)
        noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        found = like_diffusers(ours_half, **call, latents=noise), theirs(half, **call, latents=noise)
        assert_errs_at_most_twice_as_much(*found, theirs(exact, **call, latents=noise))


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_mixed_batch_equals_single_runs(edit_folder, zero_cond_t):
    """Sizes, prompts and numbers of references differ; a neighbour's content changes nothing at all."""
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    pipe.transformer.register_to_config(zero_cond_t=zero_cond_t)
    images = [[picture(64, 48)], [], [picture(40, 80, 1), picture(33, 47, 2)]]
    prompts = [PROMPT, "a cat", "a much longer instruction about the second picture"]
    call = {"negative_prompt": "bad", "height": [None, 32, None], "width": [None, 48, None]}
    batch = ours(pipe, images, prompts, **call, seed=[5, 6, 7])
    for i in range(3):
        size = {"height": call["height"][i], "width": call["width"][i]}
        alone = ours(pipe, [images[i]], prompts[i], **{**call, **size}, seed=5 + i)[0]
        torch.testing.assert_close(batch[i], alone, rtol=0, atol=2e-5)
    images[2][0] = picture(40, 80, 9)
    prompts[2] = prompts[2].replace("second", "firsts")
    again = ours(pipe, images, prompts, **call, seed=[5, 6, 8])
    assert torch.equal(again[0], batch[0]) and torch.equal(again[1], batch[1]) and not torch.equal(again[2], batch[2])


@pytest.mark.parametrize("size", [*SIZES, (5, 90), (128, 96)], ids=str)
def test_the_default_keeps_the_exact_size(edit_folder, size):
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    call = {"prompt": PROMPT, "seed": 0, "output_type": "pil"}
    assert ours(pipe, picture(*size), **call)[0].size == size
    assert ours(pipe, picture(*size), **call, height=21, width=50)[0].size == (50, 21)


def test_the_default_moves_no_pixel():
    image = picture(61, 37)
    seen = conditions.prepare_reference(image, preserve_size=True, condition_area=384 * 384)
    assert seen.condition is image and seen.vae.size == (64, 48)
    assert seen.vae.crop((0, 0, 61, 37)).tobytes() == image.tobytes()
    assert seen.vae.getpixel((63, 47)) == image.getpixel((60, 36))
    large = conditions.prepare_reference(picture(256, 128), preserve_size=True, condition_area=96 * 96)
    assert large.condition.size == (128, 64) and large.vae.size == (256, 128)


def test_conditions_for_training_are_those_of_the_pipeline(edit_folder):
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    images = [[np.asarray(picture(64, 48))], [], [np.asarray(picture(40, 80, 1)), np.asarray(picture(33, 47, 2))]]
    prompts = [PROMPT, "a cat", "swap them"]
    states = encode_edit_prompts(pipe.text_encoder, pipe.tokenizer, pipe.processor, prompts, images)
    seen = {}

    def keep(pipe, step, timestep, kwargs):
        seen["embeds"] = kwargs["prompt_embeds"]

    ours(pipe, images, prompts, height=32, width=32, seed=0,
         callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    for row, state in zip(seen["embeds"], states):
        assert torch.equal(row[: len(state)], state.detach())
    states[2].square().sum().backward()
    encoder = pipe.text_encoder
    assert encoder.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    assert encoder.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_the_last_block_computes_the_target_only(edit_folder):
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    rows = {}
    last = pipe.transformer.transformer_blocks[-1]
    for name, module in (("q", last.attn.to_q), ("mlp", last.img_mlp.net[2]), ("out", pipe.transformer.proj_out)):
        module.register_forward_hook(lambda m, a, y, name=name: rows.update({name: y.shape[0]}))
    ours(pipe, [picture(64, 64), picture(32, 32)], PROMPT, height=48, width=48, seed=0)
    assert rows == {"q": 9, "mlp": 9, "out": 9}


@pytest.mark.parametrize("name", NAMES)
def test_the_drop_in_equals_diffusers(edit_folder, small, name):
    """With prompts and pictures through both encoders."""
    call = {"image": picture(64, 48), "prompt": PROMPT, "negative_prompt": " "}
    plain, fast = reference(name, edit_folder), reference(name, edit_folder)
    assert len(qwen_image_fast.accelerate(fast).replaced) == 4
    torch.testing.assert_close(
        theirs(fast, **call, generator=seeded(7)), theirs(plain, **call, generator=seeded(7)), rtol=0, atol=5e-5
    )


def test_a_shared_picture_is_encoded_once(edit_folder, monkeypatch):
    pipe, runs = QwenImageEditPlusPipeline.from_pretrained(edit_folder), {"vae": 0, "vision": 0}
    for name, module in (("vae", pipe.vae.encoder), ("vision", pipe.text_encoder.visual.patch_embed)):
        module.register_forward_hook(lambda m, a, y, name=name: runs.update({name: runs[name] + 1}))
    ours(pipe, picture(48, 48), ["a", "b"], negative_prompt=["c", "d"], num_images_per_prompt=2, seed=0)
    assert runs == {"vae": 1, "vision": 1}


def test_save_and_load(edit_folder, tmp_path):
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    call = {"image": picture(48, 48), "prompt": PROMPT, "seed": 0}
    pipe.save_pretrained(tmp_path / "saved")
    again = QwenImageEditPlusPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(ours(again, **call), ours(pipe, **call))
    assert set(pipe.components) == {*qwen_image_fast.QwenImagePipeline.parts, "processor"}


def test_components_of_a_diffusers_pipeline(edit_folder):
    pipe = QwenImageEditPipeline.from_pretrained(edit_folder)
    parts = reference("QwenImageEditPipeline", edit_folder).components
    shared = QwenImageEditPipeline(**{**parts, "transformer": pipe.transformer, "vae": pipe.vae})
    call = {"image": picture(48, 48), "prompt": PROMPT, "seed": 0}
    torch.testing.assert_close(ours(shared, **call), ours(pipe, **call), rtol=0, atol=1e-5)


def test_an_edit_needs_a_picture(edit_folder):
    """Edit-Plus draws without one, as text to image."""
    call = {"prompt": PROMPT, "height": 32, "width": 32, "seed": 0}
    pipe = QwenImageEditPipeline.from_pretrained(edit_folder)
    with pytest.raises(ValueError, match="image must be given, got None"):
        ours(pipe, None, **call)
    with pytest.raises(ValueError, match="image must have pixels, got 0x8"):
        ours(pipe, Image.new("RGB", (0, 8)), **call)
    assert ours(QwenImageEditPlusPipeline.from_pretrained(edit_folder), None, **call).shape == (1, 4, 64)


def test_a_text_to_image_folder_is_named(tiny_folder):
    with pytest.raises(FileNotFoundError, match="no processor folder .* editing needs an editing model's folder"):
        QwenImageEditPipeline.from_pretrained(tiny_folder)


class ChatProcessor(Processor):
    """With Qwen's chat template."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        text = ""
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            shown = "".join(p.get("text", "<|vision_start|><|image_pad|><|vision_end|>") for p in parts)
            text += f"<|im_start|>{message['role']}\n{shown}<|im_end|>\n"
        return text + "<|im_start|>assistant\n"


def test_a_local_model_sees_the_pictures_of_an_edit(edit_folder, monkeypatch):
    """Untrained, it answers tokens that depend on all that it sees; the edit is then that of its answer."""
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    model = load_captioner(edit_folder / "text_encoder")
    enhance = LocalEnhancer(
        model, pipe.tokenizer, ChatProcessor(pipe.tokenizer, edit_folder / "processor"), max_new_tokens=6
    )
    seen = []
    generate = type(model).generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs) or generate(model, **inputs))
    call = {"image": [picture(32, 32), picture(48, 32, 1)], "seed": 0, "num_inference_steps": 2, "progress": False}
    pipe.prompt_enhancer = enhance
    out = pipe(prompt=PROMPT, output_type="latent", **call)
    (inputs,) = seen
    text = pipe.tokenizer.decode(inputs["input_ids"][0])
    assert POLISH in text and PROMPT in text and len(inputs["image_grid_thw"]) == 2
    pipe.prompt_enhancer = None
    assert torch.equal(pipe(prompt=out.prompts[0], output_type="latent", **call).images, out.images)
    assert out.prompts[0] not in ("", PROMPT)

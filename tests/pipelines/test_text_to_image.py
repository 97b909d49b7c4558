"""Text to image against diffusers' pipeline with the same folder and seed, and what only ours can do."""

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline as Diffusers
from reference import assert_errs_at_most_twice_as_much

from qwen_image_fast import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from qwen_image_fast.schedulers import lightning_config

PROMPTS = ['a red "CAT" on a white ground', "猫"]
SIZE = {"height": 48, "width": 80, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pair(tiny_folder):
    return load(tiny_folder, torch.float32)


def load(folder, dtype):
    theirs = Diffusers.from_pretrained(folder, dtype=dtype)
    theirs.set_progress_bar_config(disable=True)
    return QwenImagePipeline.from_pretrained(folder, torch_dtype=dtype), theirs


def seeded(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def ours(pipe, *args, **kwargs):
    return pipe(*args, progress=False, **{"output_type": "latent", **SIZE, **kwargs}).images


def theirs(pipe, *args, **kwargs):
    return pipe(*args, **{"output_type": "latent", **SIZE, **kwargs}).images


CALLS = {
    "no guidance": {"prompt": PROMPTS[0]},
    "guidance": {"prompt": PROMPTS[0], "negative_prompt": " "},
    "long negative": {"prompt": PROMPTS[1], "negative_prompt": "blurry, low quality, watermark", "true_cfg_scale": 2.5},
    "two prompts": {"prompt": PROMPTS, "negative_prompt": ["bad", "even worse"]},
    "sigmas": {"prompt": PROMPTS[0], "negative_prompt": " ", "sigmas": [1.0, 0.6, 0.3, 0.1], "num_inference_steps": 4},
    "square": {"prompt": PROMPTS[0], "negative_prompt": " ", "height": 64, "width": 64},
    "tall": {"prompt": PROMPTS[0], "negative_prompt": " ", "height": 112, "width": 16},
    "cut prompt": {"prompt": "word " * 40, "negative_prompt": " ", "max_sequence_length": 9},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_latents_equal_diffusers(pair, call):
    count = len(call["prompt"]) if isinstance(call["prompt"], list) else 1
    expected = theirs(pair[1], **call, generator=seeded(*range(7, 7 + count)))
    got = ours(pair[0], **call, seed=7)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much(tiny_folder, dtype):
    exact_ours, exact = load(tiny_folder, torch.float64)
    half_ours, half = load(tiny_folder, dtype)
    for seed, (height, width) in enumerate(((64, 64), (48, 80), (112, 16))):
        tokens = (height // 16) * (width // 16)
        noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        call = {"prompt": PROMPTS[0], "negative_prompt": "bad", "height": height, "width": width}
        truth = theirs(exact, **call, latents=noise)
        assert_errs_at_most_twice_as_much(
            ours(half_ours, **call, latents=noise), theirs(half, **call, latents=noise), truth
        )
    # diffusers rounds the latents of a float64 pipeline to float32 at every step.
    torch.testing.assert_close(ours(exact_ours, **call, latents=noise), truth, rtol=0, atol=1e-5)


def test_images_equal_diffusers(pair):
    call = {"prompt": PROMPTS, "negative_prompt": " ", "num_images_per_prompt": 1}
    expected = theirs(pair[1], **{**call, "negative_prompt": [" ", " "]}, generator=seeded(3, 4), output_type="np")
    images = ours(pair[0], **call, seed=3, output_type="np")
    assert np.abs(np.stack(images) - expected).max() < 1 / 255
    pil = ours(pair[0], **call, seed=3, output_type="pil")
    assert [i.size for i in pil] == [(80, 48)] * 2
    tensor = ours(pair[0], **call, seed=3, output_type="pt")[0]
    np.testing.assert_allclose(tensor.permute(1, 2, 0), images[0])


def test_one_generator_draws_the_batch_as_diffusers_does(pair):
    call = {"prompt": PROMPTS[0], "num_images_per_prompt": 3}
    expected = theirs(pair[1], **call, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        ours(pair[0], **call, generator=torch.Generator().manual_seed(5)), expected, rtol=0, atol=5e-5
    )


def test_embeddings_in_and_masks_with_holes(pair):
    torch.manual_seed(0)
    embeds = torch.randn(2, 6, 128)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    call = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
    torch.testing.assert_close(
        ours(pair[0], **call, generator=seeded(1, 2)),
        theirs(pair[1], **call, generator=seeded(1, 2)),
        rtol=0,
        atol=5e-5,
    )
    padded, mask = pair[0].encode_prompt(PROMPTS)
    torch.testing.assert_close(ours(pair[0], prompt_embeds=padded, prompt_embeds_mask=mask, seed=1),
                               ours(pair[0], PROMPTS, seed=1), rtol=0, atol=1e-5)  # fmt: skip


def test_a_mixed_batch_equals_single_runs(pair):
    """Prompts, sizes and so the schedules differ; equal within the rounding of library GEMMs."""
    sizes = [(48, 80), (64, 64), (16, 32)]
    prompts = [*PROMPTS, "a much longer prompt about a yellow house by the sea"]
    call = {"negative_prompt": "bad", "num_inference_steps": 4}
    batch = ours(pair[0], prompts, seed=[5, 6, 7], height=[h for h, _ in sizes], width=[w for _, w in sizes], **call)
    for i, (h, w) in enumerate(sizes):
        alone = ours(pair[0], prompts[i], seed=5 + i, height=h, width=w, **call)[0]
        torch.testing.assert_close(batch[i], alone, rtol=0, atol=2e-5)
        expected = theirs(pair[1], prompts[i], generator=seeded(5 + i), height=h, width=w, **call)[0]
        torch.testing.assert_close(batch[i], expected, rtol=0, atol=5e-5)


def test_neighbours_content_changes_nothing(pair):
    one = ours(pair[0], [PROMPTS[0], "AAAA"], negative_prompt=" ", seed=[1, 2])[0]
    two = ours(pair[0], [PROMPTS[0], "BBBB"], negative_prompt=" ", seed=[1, 9])[0]
    assert torch.equal(one, two)


def test_callback_and_interrupt(pair):
    seen = {0: [], 1: []}

    def record(which):
        def callback(pipe, step, timestep, kwargs):
            seen[which].append((step, float(timestep), kwargs["latents"].clone()))
            if step == 1:
                pipe._interrupt = True
            return {"latents": kwargs["latents"] * 0.5}

        return callback

    call = {"prompt": PROMPTS[0], "negative_prompt": " "}
    a = ours(pair[0], **call, seed=1, callback_on_step_end=record(0))
    b = theirs(pair[1], **call, generator=seeded(1), callback_on_step_end=record(1))
    torch.testing.assert_close(a, b, rtol=0, atol=5e-5)
    assert len(seen[0]) == len(seen[1]) == 2
    for (i, t, x), (j, u, y) in zip(*seen.values()):
        assert i == j and abs(t - u) < 1e-3
        torch.testing.assert_close(x, y, rtol=0, atol=5e-5)


def test_seeds_are_reported_and_repeatable(pair):
    out = pair[0](PROMPTS[0], output_type="latent", progress=False, num_images_per_prompt=2, **SIZE)
    assert out.seeds[1] == out.seeds[0] + 1
    again = ours(pair[0], PROMPTS[0], seed=out.seeds[1])
    torch.testing.assert_close(again[0], out.images[1], rtol=0, atol=1e-5)


def test_modulation_is_computed_once_per_schedule(tiny_folder):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)
    calls = []
    modulation = pipe.transformer.modulation
    pipe.transformer.modulation = lambda *levels: calls.append(1) or modulation(*levels)
    first = ours(pipe, PROMPTS[0], negative_prompt=" ", seed=0)
    assert torch.equal(first, ours(pipe, PROMPTS[0], negative_prompt=" ", seed=0)) and len(calls) == 1
    ours(pipe, PROMPTS[0], seed=0, num_inference_steps=2)
    assert len(calls) == 2
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].img_mod[1].weight.mul_(1.5)
    changed = ours(pipe, PROMPTS[0], negative_prompt=" ", seed=0)
    assert len(calls) == 3 and not torch.equal(first, changed)


def test_modulation_weights_written_through_data_are_seen(tiny_folder):
    """A merge of adapters or an average of weights writes so, and leaves no version behind."""
    pipe, other = (QwenImagePipeline.from_pretrained(tiny_folder) for _ in range(2))
    before = ours(pipe, PROMPTS[0], seed=0)
    for p in (pipe, other):
        p.transformer.transformer_blocks[1].img_mod[1].weight.data.mul_(-1)
    after = ours(pipe, PROMPTS[0], seed=0)
    assert torch.equal(after, ours(other, PROMPTS[0], seed=0)) and not torch.equal(after, before)


def test_freed_modulation_weights(tiny_folder):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    plain = QwenImagePipeline.from_pretrained(tiny_folder)
    size = sum(p.numel() for p in pipe.transformer.parameters())
    first = ours(pipe, PROMPTS[0], negative_prompt=" ", seed=0)
    assert torch.equal(first, ours(plain, PROMPTS[0], negative_prompt=" ", seed=0))
    freed = size - sum(p.numel() for p in pipe.transformer.parameters())
    width = 192
    assert freed == 5 * 2 * (width + 1) * 6 * width + (width + 1) * 2 * width
    assert torch.equal(first, ours(pipe, PROMPTS[0], negative_prompt=" ", seed=0))
    # Another schedule reads them again, and so does writing the model.
    other = ours(pipe, PROMPTS[0], seed=0, num_inference_steps=2)
    assert torch.equal(other, ours(plain, PROMPTS[0], seed=0, num_inference_steps=2))
    state, expected = pipe.transformer.state_dict(), plain.transformer.state_dict()
    assert all(torch.equal(state[k], expected[k]) for k in expected)


def test_freed_weights_without_a_folder_say_so(tiny_folder):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    pipe.transformer.weight_files = ()
    ours(pipe, PROMPTS[0], seed=0)
    with pytest.raises(RuntimeError, match="the modulation weights were released after the first schedule"):
        ours(pipe, PROMPTS[0], seed=0, num_inference_steps=2)


def test_lightning_schedule(tiny_folder):
    ours_pipe, theirs_pipe = load(tiny_folder, torch.float32)
    ours_pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(lightning_config())
    theirs_pipe.scheduler = type(theirs_pipe.scheduler).from_config(lightning_config())
    call = {"prompt": PROMPTS[0], "num_inference_steps": 4}
    torch.testing.assert_close(
        ours(ours_pipe, **call, seed=0), theirs(theirs_pipe, **call, generator=seeded(0)), rtol=0, atol=5e-5
    )


def test_save_and_load(tiny_folder, tmp_path):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16, free_modulation_weights=True)
    expected = ours(pipe, PROMPTS[0], seed=0)
    pipe.save_pretrained(tmp_path / "saved")
    assert QwenImagePipeline.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    again = QwenImagePipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert torch.equal(ours(again, PROMPTS[0], seed=0), expected)
    Diffusers.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)


def test_components_of_a_diffusers_pipeline(pair, tiny_folder):
    shared = QwenImagePipeline(**{**pair[1].components, "transformer": pair[0].transformer, "vae": pair[0].vae})
    torch.testing.assert_close(ours(shared, PROMPTS[0], seed=0), ours(pair[0], PROMPTS[0], seed=0))


WARNINGS = {
    "true_cfg_scale=4.0 has no effect without a negative_prompt": {},
    "negative_prompt has no effect: true_cfg_scale is 1.0": {"negative_prompt": " ", "true_cfg_scale": 1.0},
    "guidance_scale is ignored": {"guidance_scale": 2.0, "true_cfg_scale": 1.0},
    "prompt 0 has 105 tokens with the template's end, but max_sequence_length is 20": {
        "prompt": "x" * 100, "max_sequence_length": 20, "true_cfg_scale": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("text", "call"), WARNINGS.items(), ids=WARNINGS.keys())
def test_warnings_are_said_once_for_a_pipeline(tiny_folder, text, call, caplog):
    for _ in range(2):
        pipe = QwenImagePipeline.from_pretrained(tiny_folder)
        for _ in range(2):
            ours(pipe, **{"prompt": PROMPTS[0], "seed": 0, "num_inference_steps": 1, **call})
    assert [record.getMessage()[: len(text)] for record in caplog.records] == [text, text]


E = torch.randn(1, 4, 128)
ERRORS = {
    "height must be a positive multiple of 16, got 50; 48 would do": {"height": 50},
    "width must be a positive multiple of 16, got 0": {"width": 0},
    "height must be one for all or one for each prompt, 1, got 2": {"height": [48, 48]},
    "num_inference_steps must be an integer of at least 1, got 0": {"num_inference_steps": 0},
    "num_images_per_prompt must be an integer of at least 1, got 0": {"num_images_per_prompt": 0},
    "output_type must be one of pil, np, pt, latent, got gif": {"output_type": "gif"},
    "prompt must hold at least one prompt, got an empty list": {"prompt": []},
    "prompt must be a str or a list of str, got int": {"prompt": 3},
    "give either prompt or prompt_embeds, got both": {"prompt_embeds": E},
    "give either prompt or prompt_embeds, got neither": {"prompt": None},
    "prompt_embeds must have the shape": {"prompt": None, "prompt_embeds": E[0]},
    "prompt_embeds must be floating point, 128 wide": {"prompt": None, "prompt_embeds": E[..., :64]},
    "prompt_embeds must be floating point": {"prompt": None, "prompt_embeds": E.int()},
    "prompt_embeds must be finite, got NaN or infinity in entry 0": {"prompt": None, "prompt_embeds": E * float("nan")},
    "prompt_embeds_mask must have": {"prompt": None, "prompt_embeds": E, "prompt_embeds_mask": torch.ones(1, 3)},
    "negative_prompt must be one for all or one for each prompt, 1, got 2": {"negative_prompt": ["a", "b"]},
    "give either generator or seed, got both": {"seed": 1, "generator": torch.Generator()},
    "generator must be one or one for each image, 1, got 2": {"generator": seeded(1, 2)},
    "seed must be one or one for each image, 1, got 3": {"seed": [1, 2, 3]},
    r"latents must be packed tokens \(15, 64\) for 80x48 pixels": {"latents": torch.randn(1, 12, 64)},
    "latents must hold one entry per image, 1, got 2": {"latents": torch.randn(2, 15, 64)},
    "latents must be finite": {"latents": torch.full((1, 15, 64), float("inf"))},
    "max_sequence_length must be in 1..1024": {"max_sequence_length": 2000},
    "attention_kwargs must hold nothing but scale, .*, got gain": {"attention_kwargs": {"gain": 1}},
    "attention_kwargs: scale must be a finite number, got 'half'": {"attention_kwargs": {"scale": "half"}},
    "callback_on_step_end_tensor_inputs must be of": {"callback_on_step_end_tensor_inputs": ["noise"]},
}  # fmt: skip


@pytest.mark.parametrize(("text", "change"), ERRORS.items(), ids=ERRORS.keys())
def test_errors(pair, text, change):
    with pytest.raises((ValueError, TypeError), match=text):
        ours(pair[0], **{"prompt": PROMPTS[0], **change})


def test_a_hook_on_the_modulation_is_seen(tiny_folder):
    """Though the vectors of the schedule are known without it; and gone again with it."""
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)
    before = ours(pipe, PROMPTS[0], seed=0)
    hook = pipe.transformer.transformer_blocks[1].img_mod[1].register_forward_hook(lambda m, a, out: out * 1.1)
    assert not torch.equal(ours(pipe, PROMPTS[0], seed=0), before)
    hook.remove()
    assert torch.equal(ours(pipe, PROMPTS[0], seed=0), before)


def test_nan_weights_are_named(tiny_folder):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[2].attn.to_k.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="transformer has NaN or infinity in transformer_blocks.2.attn.to_k.weight"):
        ours(pipe, PROMPTS[0], seed=0)


def test_a_folder_of_another_pipeline(tiny_folder, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="must hold a Qwen-Image pipeline, its model_index.json names FluxPipeline"):
        QwenImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unet is not an argument; known are scheduler, text_encoder"):
        QwenImagePipeline.from_pretrained(tiny_folder, unet=None)

"""The condition encoder against diffusers' pipeline methods on the tiny Qwen2.5-VL."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from qwen_image_fast import tiny
from qwen_image_fast.models import text_encoder as te

PROMPTS = ['"CAT" red', "", " ", "一只红色的猫，背景是“上海”。", "a long prompt {with braces} " * 6, '"DOG" red']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny._write_text_encoder(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="module")
def full(folder):
    """The reference: transformers' model with its head, loaded by transformers."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def base(folder):
    return te.load_text_encoder(folder)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def copy_of(folder, tmp_path):
    """A folder of the same encoder whose files a test may change: (folder, config, tensors)."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return tmp_path, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def pipeline(name, text_encoder=None, tokenizer=None):
    """One of diffusers' pipelines without transformer and VAE; the constructor sets the templates."""
    diffusers = pytest.importorskip("diffusers")
    components = {"scheduler": None, "vae": None, "transformer": None}
    if name != "QwenImagePipeline":
        components["processor"] = None
    return getattr(diffusers, name)(text_encoder=text_encoder, tokenizer=tokenizer, **components)


@pytest.mark.parametrize(
    "name, template, drop",
    [
        ("QwenImagePipeline", te.T2I_TEMPLATE, te.T2I_DROP),
        ("QwenImageEditPipeline", te.EDIT_TEMPLATE, te.EDIT_DROP),
        ("QwenImageEditPlusPipeline", te.EDIT_PLUS_TEMPLATE, te.EDIT_PLUS_DROP),
    ],
)
def test_templates_are_those_of_diffusers(name, template, drop):
    pipe = pipeline(name)
    assert template == pipe.prompt_template_encode
    assert drop == pipe.prompt_template_encode_start_idx


def test_picture_prefix_is_that_of_diffusers():
    pipe = pipeline("QwenImageEditPlusPipeline")
    constants = type(pipe)._get_qwen_prompt_embeds.__code__.co_consts
    assert te.EDIT_PLUS_PICTURE in constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_sequence_length", [1024, 24])
def test_rows_equal_diffusers(folder, tokenizer, dtype, max_sequence_length):
    full = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).to(dtype).eval()
    pipe = pipeline("QwenImagePipeline", full, tokenizer)
    expected, expected_mask = pipe.encode_prompt(PROMPTS, "cpu", max_sequence_length=max_sequence_length)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for encoder in (full, full.model):
        rows = te.encode_prompts(encoder, tokenizer, PROMPTS, max_sequence_length=max_sequence_length)
        embeds, mask = te.pad_prompt_embeds(rows)
        assert torch.equal(mask, expected_mask) and embeds.dtype == dtype
        valid = mask.bool()
        torch.testing.assert_close(embeds[valid], expected[valid], rtol=0, atol=tolerance)
        assert not embeds[~valid].any()


def test_last_hidden_state_is_after_the_norm(full, tokenizer):
    (row,) = te.encode_prompts(full, tokenizer, ["cat"], max_sequence_length=64)
    inputs = tokenizer(te.T2I_TEMPLATE.format("cat"), return_tensors="pt")
    expected = full(**inputs, output_hidden_states=True).hidden_states[-1][0, te.T2I_DROP :]
    assert torch.equal(row, expected)
    assert len(row) == 3 + 5  # the letters, and the template's end
    assert row.square().mean(-1).sqrt() == pytest.approx(1, rel=1e-3)


def test_longer_prompts_are_cut_with_a_warning(base, tokenizer, caplog):
    prompts = ["x" * 100, "x" * 19, "y" * 20]  # 105, 24 and 25 tokens with the template's end
    with caplog.at_level(logging.WARNING, logger=te.__name__):
        for _ in range(2):  # and said once
            rows = te.encode_prompts(base, tokenizer, prompts, max_sequence_length=24)
    assert [len(row) for row in rows] == [24, 24, 24]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 0 has 105 tokens with the template's end, but max_sequence_length is 24: the last 81 were cut of "
        f"'{'x' * 39}",
        "prompt 2 has 25 tokens with the template's end, but max_sequence_length is 24: the last 1 were cut of "
        f"'{'y' * 20}'",
    ]
    whole = te.encode_prompts(base, tokenizer, prompts[:1], max_sequence_length=512)[0]
    assert len(whole) == 105
    torch.testing.assert_close(rows[0], whole[:24], rtol=0, atol=1e-5)


def test_tokenizer_limit_equals_diffusers(full, tokenizer):
    pipe = pipeline("QwenImagePipeline", full, tokenizer)
    prompt = "q" * 1100
    expected, _ = pipe.encode_prompt(prompt, "cpu", max_sequence_length=1024)
    (row,) = te.encode_prompts(full, tokenizer, [prompt], max_sequence_length=1024)
    assert row.shape == expected[0].shape == (1024, 128)
    torch.testing.assert_close(row, expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_neighbours_and_padding_side_do_not_matter(base, side):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.padding_side = side
    alone = [te.encode_prompts(base, tokenizer, [prompt], max_sequence_length=512)[0] for prompt in PROMPTS[:5]]
    together = te.encode_prompts(base, tokenizer, PROMPTS[:5], max_sequence_length=512)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_prompts_of_equal_length_share_a_batch_and_equal_prompts_a_row(base, tokenizer, monkeypatch):
    shapes = []
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda **kw: shapes.append(tuple(kw["input_ids"].shape)) or forward(**kw))
    prompts = ["cat", "tiger", "dog", "cat"]
    rows = te.encode_prompts(base, tokenizer, prompts, max_sequence_length=512)
    assert shapes == [(2, 34 + 8), (1, 34 + 10)]
    assert torch.equal(rows[0], rows[3]) and rows[0].data_ptr() != rows[3].data_ptr()
    monkeypatch.undo()
    for prompt, row in zip(prompts, rows, strict=True):
        (alone,) = te.encode_prompts(base, tokenizer, [prompt], max_sequence_length=512)
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


def test_the_head_never_runs(full, tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the language-model head ran")

    monkeypatch.setattr(full.lm_head, "forward", fail)
    te.encode_prompts(full, tokenizer, ["cat"], max_sequence_length=64)


def test_gradients_flow_where_they_are_enabled(folder, tokenizer):
    encoder = te.load_text_encoder(folder, vision=False)
    with torch.enable_grad():
        te.encode_prompts(encoder, tokenizer, ["cat"], max_sequence_length=64)[0].square().sum().backward()
    assert encoder.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ([], ValueError, "prompts must hold at least one prompt, got an empty list"),
        ("cat", TypeError, "prompts must be a list of str, got str"),
        (None, TypeError, "prompts must be a list of str, got NoneType"),
        (["cat", 3], TypeError, r"prompts\[1\] must be a str, got int"),
    ],
)
def test_wrong_prompts(base, tokenizer, prompts, error, message):
    with pytest.raises(error, match=message):
        te.encode_prompts(base, tokenizer, prompts, max_sequence_length=64)


@pytest.mark.parametrize("length", [0, 1025])
def test_wrong_max_sequence_length(base, tokenizer, length):
    with pytest.raises(ValueError, match=rf"max_sequence_length must be in 1\.\.1024, got {length}"):
        te.encode_prompts(base, tokenizer, ["cat"], max_sequence_length=length)


def test_padding():
    rows = [torch.ones(2, 4), torch.full((3, 4), 2.0)]
    embeds, mask = te.pad_prompt_embeds(rows)
    assert embeds.shape == (2, 3, 4) and embeds[:, :, 0].tolist() == [[1, 1, 0], [2, 2, 2]]
    assert mask.dtype == torch.int64 and mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert te.pad_prompt_embeds(rows[:1])[1] is None
    with pytest.raises(ValueError, match="embeds must hold at least one tensor"):
        te.pad_prompt_embeds([])


@pytest.mark.parametrize("vision", [True, False])
def test_loaded_weights_are_those_of_transformers(folder, full, vision):
    state = torch.random.get_rng_state()
    model = te.load_text_encoder(folder, vision=vision)
    assert torch.equal(state, torch.random.get_rng_state()) and not model.training
    expected = {k: v for k, v in full.model.state_dict().items() if vision or not k.startswith("visual.")}
    state = model.state_dict()
    assert state.keys() == expected.keys()  # no head, and without vision no tower
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.config._attn_implementation == full.config._attn_implementation


def test_vision_tower_computes_the_same(base, full):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8 * 12, 3 * 2 * 14 * 14, generator=generator)
    grid = torch.tensor([[1, 8, 12]])
    assert torch.equal(base.visual(pixels, grid_thw=grid)[0], full.model.visual(pixels, grid_thw=grid)[0])


def test_vision_tensors_are_not_read(copy_of):
    folder, _, tensors = copy_of
    save_file({k: v for k, v in tensors.items() if not k.startswith("visual.")}, folder / "model.safetensors")
    assert te.load_text_encoder(folder, vision=False).visual is None
    with pytest.raises(ValueError, match=r"missing: .*visual"):
        te.load_text_encoder(folder)


def test_dtype(folder, tokenizer):
    model = te.load_text_encoder(folder, torch_dtype=torch.bfloat16, vision=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    (row,) = te.encode_prompts(model, tokenizer, ["cat"], max_sequence_length=64)
    assert row.dtype == torch.bfloat16


@pytest.mark.parametrize("nested", [False, True])
def test_sharded_files_of_both_key_layouts(copy_of, base, nested):
    folder, config, tensors = copy_of
    if nested:
        tensors = {
            "model." + (k if k.startswith("visual.") else k.replace("model.", "language_model.", 1)): v
            for k, v in tensors.items()
        }
    tensors["lm_head.weight"] = torch.zeros(config["vocab_size"], config["hidden_size"])
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expected = base.state_dict()
    loaded = te.load_text_encoder(folder).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 shards .*model-00002-of-00002\.safetensors"):
        te.load_text_encoder(folder)


def test_another_model_family_is_named(copy_of):
    folder, config, _ = copy_of
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(ValueError, match=r"model_type in .* must be 'qwen2_5_vl', got 'qwen3_vl'"):
        te.load_text_encoder(folder)


def test_folders_without_readable_weights(copy_of):
    folder, _, _ = copy_of
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        te.load_text_encoder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ValueError, match="only pickled weights"):
        te.load_text_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        te.load_text_encoder(folder)


def test_weights_that_do_not_match_the_config(copy_of):
    folder, config, tensors = copy_of
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"missing: .*layers\.2"):
        te.load_text_encoder(folder)

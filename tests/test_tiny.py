"""The tiny Qwen-Image: its tokenizer, its configurations and the folder of random weights."""

import json

import pytest
import torch

from qwen_image_fast import tiny
from qwen_image_fast.models.text_encoder import EDIT_PLUS_PICTURE, EDIT_PLUS_TEMPLATE, EDIT_TEMPLATE, T2I_TEMPLATE


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]


@pytest.mark.parametrize(
    "head, count",
    [
        (T2I_TEMPLATE.split("{}")[0], 34),
        (EDIT_TEMPLATE.split("<|vision_start|>")[0], 64),
        (EDIT_TEMPLATE.split("{}")[0], 64 + 3),
        (EDIT_PLUS_TEMPLATE.split("{}")[0], 64),
        (EDIT_PLUS_PICTURE.format(1), 8),
        (T2I_TEMPLATE.split("{}")[1], 5),
    ],
)
def test_template_parts_have_the_released_token_counts(tokenizer, head, count):
    assert len(tokenizer(head)["input_ids"]) == count


@pytest.mark.parametrize("prompt", ["cat", " cat", "\ncat", "", "你好", "'s", "), (", "user"])
def test_a_prompt_does_not_change_the_tokens_before_it(tokenizer, prompt):
    head = T2I_TEMPLATE.split("{}")[0]
    assert tokenizer(T2I_TEMPLATE.format(prompt))["input_ids"][:34] == tokenizer(head)["input_ids"]


def test_every_ascii_character_of_quoted_text_is_one_token(tokenizer):
    text = '"' + "".join(chr(c) for c in range(0x21, 0x7F)).replace("'", "") + '"'
    assert pieces(tokenizer, text) == list(text)
    assert pieces(tokenizer, '"BIG cat"') == list('"BIG cat"')


def test_a_caption_spells_its_quoted_word_and_nothing_else(tokenizer):
    pieces_of = pieces(tokenizer, '"red" in light blue on a white ground')
    assert pieces_of == [*'"red"', " in", " light", " blue", " on", " a", " white", " ground"]


def test_common_chinese_is_one_token_per_character(tokenizer):
    han = tiny._han_characters()
    assert len(han) == len(set(han)) == 3755 and set("的一是不了在人有我他这国红蓝绿") <= set(han)
    assert pieces(tokenizer, han) == list(han)
    text = "“你好”，世界。（上海）《书》——…"
    assert pieces(tokenizer, text) == list(text)
    assert len(tokenizer("龘")["input_ids"]) > 1


@pytest.mark.parametrize(
    "text",
    [
        "the user's apple (a), system users; colorful textures of a theory",
        "tabs\tand\r\nlines \n\n  x  ",
        "𝔘🙂éñ ß Ω ж 한국어 日本語 龘 \u3000",
        "<|im_start|>user\nhi<|im_end|>",
        "\x00\x7f\x80\xad\xff",
    ],
)
def test_decoding_returns_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_ids_agree_with_the_text_encoder_config(tokenizer):
    config = tiny.tiny_configs()["text_encoder"]
    assert config["vocab_size"] == len(tokenizer)
    for field, token in {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "eos_token_id": "<|im_end|>",
        "bos_token_id": "<|endoftext|>",
    }.items():
        assert tokenizer(token)["input_ids"] == [config[field]]
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>", "right")
    heads = config["hidden_size"] // config["num_attention_heads"]
    assert 2 * sum(config["rope_scaling"]["mrope_section"]) == heads


def test_configs_are_fresh_copies():
    tiny.tiny_configs()["vae"]["dim_mult"].append(9)
    assert tiny.tiny_configs()["vae"]["dim_mult"] == [1, 2, 4, 4]


def test_random_weights_depend_on_seed_and_names_only():
    def drawn(seed, order):
        model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in order})
        tiny._randomise(model, seed)
        return model

    first, second, other = drawn(0, ["a", "b"]), drawn(0, ["b", "a"]), drawn(1, ["a", "b"])
    assert torch.equal(first["a"].weight, second["a"].weight) and torch.equal(first["b"].weight, second["b"].weight)
    assert not torch.equal(first["a"].weight, other["a"].weight) and not first["a"].bias.any()
    assert first["a"].weight.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_folder_has_the_released_layout(tiny_folder):
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImagePipeline"
    assert {name for name in index if not name.startswith("_")} == {p.name for p in tiny_folder.iterdir() if p.is_dir()}
    assert index["transformer"][0] == index["vae"][0] == index["scheduler"][0] == "diffusers"
    assert index["text_encoder"][0] == index["tokenizer"][0] == "transformers"
    assert sum(p.stat().st_size for p in tiny_folder.rglob("*")) < 40e6


def test_writing_is_deterministic_and_leaves_the_global_generator(tiny_folder, tmp_path):
    state = torch.random.get_rng_state()
    tiny.write_untrained(tmp_path / "again")
    assert torch.equal(state, torch.random.get_rng_state())
    for path in tiny_folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tiny_folder)).read_bytes(), path.name
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_a_folder_with_contents_is_not_overwritten(tmp_path):
    pytest.importorskip("qwen_image_fast.models.transformer")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="folder must be empty or not exist"):
        tiny.write_untrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_diffusers_loads_the_folder_and_the_prompt_changes_the_image(tiny_folder):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.QwenImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)

    def image(prompt):
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, height=64, width=64, num_inference_steps=2, generator=generator, output_type="pt").images

    cat, dog = image('"CAT" red'), image('"DOG" 蓝色')
    assert cat.shape == (1, 3, 64, 64) and cat.isfinite().all() and cat.std() > 0.02
    assert (cat - dog).abs().max() > 1 / 255


def test_edit_folder_has_the_released_layout(tmp_path):
    tiny.write_untrained(tmp_path / "edit", edit=True)
    index = json.loads((tmp_path / "edit" / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImageEditPlusPipeline"
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]
    assert {n for n in index if not n.startswith("_")} == {p.name for p in (tmp_path / "edit").iterdir() if p.is_dir()}
    transformers = pytest.importorskip("transformers", minversion="5")
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "edit" / "processor")
    assert processor.patch_size == 14 and processor.size["longest_edge"] == 84 * 84

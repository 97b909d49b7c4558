"""The adapters of SigLIP 2 and of the local captioner, on transformers' own classes with small random weights."""

import shutil

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from data_pictures import noise, photo_record

from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.tiny import write_untrained
from qwen_image_fast.training.data import annotate as module
from qwen_image_fast.training.data.annotation import PROMPT, SYSTEM
from qwen_image_fast.training.data.filters.picture import Picture
from qwen_image_fast.training.data.judge import build_filters, judge
from qwen_image_fast.training.data.recipe import AnnotateRecipe, FilterRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards

PARTS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"vocab_size": 32, "max_position_embeddings": 64, "projection_size": 16, "bos_token_id": 2, "eos_token_id": 1}


def write_siglip(folder, kind):
    """SigLIP 2 as released: of a fixed size under the classes of the first SigLIP, of any size (NaFlex) under its own.

    Both have Gemma's tokenizer, which names no longest text.
    """
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz▁"]
    tokenizer = transformers.GemmaTokenizer(vocab={word: number for number, word in enumerate(words)})
    if kind == "fixed":
        vision = {"image_size": 32, "patch_size": 16, **PARTS}
        config = transformers.SiglipConfig(text_config=TEXT | PARTS, vision_config=vision)
        shown = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        transformers.SiglipProcessor(shown, tokenizer).save_pretrained(folder)
        transformers.SiglipModel(config).save_pretrained(folder)
    else:
        vision = {"num_patches": 256, "patch_size": 16, **PARTS}
        config = transformers.Siglip2Config(text_config=TEXT | PARTS, vision_config=vision)
        shown = transformers.Siglip2ImageProcessor()
        transformers.Siglip2Processor(shown, tokenizer).save_pretrained(folder)
        transformers.Siglip2Model(config).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["fixed", "naflex"])
def test_siglip_of_a_folder(kind, tmp_path):
    """The cosine of the model's own embeddings; the text in small letters, with 64 tokens and no mask."""
    write_siglip(tmp_path / "model", kind)
    recipe = FilterRecipe(stages=[1, 3], without=["nsfw"])
    recipe.captions.siglip, recipe.captions.min_alignment = str(tmp_path / "model"), -1.0
    filters = build_filters(recipe)
    model = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    scores = []
    for name, caption in (("chelsea.png", "A Cat on a sofa"), ("coffee.png", "a cup of coffee " * 40)):
        row = judge(photo_record(name, caption), [f for f in filters if f.name != "invalid_caption"], 10**8)[1]
        assert row["kept"], row
        tokens = processor.tokenizer([caption.lower()])["input_ids"][0][:64]
        assert processor.tokenizer.padding_side == "left" and 3 not in tokens  # unknown
        ids = torch.tensor([[0] * (64 - len(tokens)) + tokens])
        pixels = processor.image_processor(images=Picture(photo_record(name)).work, return_tensors="pt")
        with torch.inference_mode():
            output = model(input_ids=ids, **pixels)
        expected = torch.cosine_similarity(output.image_embeds, output.text_embeds).item()
        scores.append(row["alignment"])
        assert scores[-1] == pytest.approx(expected, abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)
    assert judge(photo_record(caption="一只猫坐在沙发上"), filters, 10**8)[1]["alignment"] is None


def test_qwen_of_a_folder(tmp_path, monkeypatch):
    """A small Qwen2.5-VL sees the picture and the question; what random weights say is no annotation, and rejected."""
    write_untrained(tmp_path / "tiny", edit=True)
    folder = shutil.copytree(tmp_path / "tiny" / "processor", tmp_path / "captioner")
    shutil.copytree(tmp_path / "tiny" / "text_encoder", folder, dirs_exist_ok=True)
    write_shards([Record(noise(1, 56, 84), origin="noise"), Record(b"no picture", origin="page")], tmp_path / "in")
    recipe = AnnotateRecipe([SourceRecipe(str(tmp_path / "in"))], model=str(folder), attempts=1, max_tokens=8)
    seen = []
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    generate = kind.generate
    monkeypatch.setattr(kind, "generate", lambda self, **given: seen.append(given) or generate(self, **given))
    result = module.annotate(recipe, tmp_path / "out")
    assert (result.seen, result.annotated) == (2, 0)
    (asked,) = seen
    assert asked["max_new_tokens"] == 8 and asked["do_sample"] is False
    assert asked["image_grid_thw"].tolist() == [[1, 4, 6]] and asked["pixel_values"].shape[0] == 24
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(asked["input_ids"][0])
    system, user = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", f"{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{system}<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>{user}"
    noisy, page = (row["reason"] for row in pq.read_table(tmp_path / "out" / "audit.parquet").to_pylist())
    assert "JSON" in noisy and "it cannot be decoded" in page, noisy


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_no_captioner_in_a_folder(missing, tmp_path):
    folder = shutil.copytree(SHIPPED / "processor", tmp_path / "captioner")
    shutil.copytree(SHIPPED / "text_encoder", folder, dirs_exist_ok=True)
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match="there is no Qwen2.5-VL in .*: give its Hugging Face folder"):
        module.captioner(AnnotateRecipe([SourceRecipe("x")], model=str(folder)))

"""The tiny model that comes with the package: its size, who can read it, and that it writes and edits."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_image_fast
from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.training.evaluation.cases import TextCase, held_out_edits, psnr_outside
from qwen_image_fast.training.evaluation.edit_checks import seen_done
from qwen_image_fast.training.evaluation.evaluate_edit import edited_by
from qwen_image_fast.training.ship import LARGEST, ship
from qwen_image_fast.training.synthesis.generator import make
from qwen_image_fast.training.synthesis.recipe import tiny
from qwen_image_fast.training.synthesis.words import is_held_out

CALL = {"num_inference_steps": 20, "true_cfg_scale": 1.0}
# In no training picture: all are on the evaluation side of the split.
WORDS = [
    ("fox", "red", "white"),
    ("Beach", "blue", "yellow"),
    ("IDEA", "black", "light blue"),
    ("door", "green", "white"),
    ("Magic", "white", "black"),
    ("SKY", "purple", "pink"),
    ("nine", "yellow", "dark blue"),
    ("Gift", "red", "white"),
]
LEAST_WORDS = 6  # of these eight; the model card says how often it is right


@pytest.fixture(scope="module")
def editor():
    return QwenImageEditPlusPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def drawer(editor):
    return QwenImagePipeline(**{name: getattr(editor, name) for name in QwenImagePipeline.parts})


def test_it_is_small_and_holds_no_code():
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= LARGEST
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_diffusers_draws_the_same_picture(drawer):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 128, "output_type": "np", "num_inference_steps": 6, "true_cfg_scale": 1.0}
    expected = theirs('"SUN" in red on a white ground', generator=torch.Generator().manual_seed(3), **call).images[0]
    made = drawer('"SUN" in red on a white ground', seed=3, progress=False, **call).images[0]
    assert np.abs(made - expected).max() < 2 / 255


def test_it_writes_words_that_it_never_saw(drawer):
    pytest.importorskip("rapidocr")
    from qwen_image_fast.training.evaluation.evaluate_text import drawn_by, evaluate
    from qwen_image_fast.training.evaluation.ocr import Reader

    chosen = [(word, colour, ground) for word, colour, ground in WORDS if is_held_out(word)]
    assert len(chosen) == len(WORDS)
    cases = [TextCase(f'"{w}" in {c} on a {g} ground', (w,), colours={"text": c, "ground": g}) for w, c, g in chosen]
    draw = drawn_by(drawer, seed=0, height=128, width=128, **CALL)
    results = list(evaluate(draw, cases, tiny(128), Reader(), batch=8))
    assert sum(r.score.words_right for r in results) >= LEAST_WORDS, [r.read for r in results]
    assert sum(bool(r.colours_right) for r in results) >= 7


def test_it_changes_texts_to_words_that_it_never_saw(editor):
    pytest.importorskip("rapidocr")
    from qwen_image_fast.training.evaluation.evaluate_edit import evaluate_edits
    from qwen_image_fast.training.evaluation.ocr import Reader

    pairs = held_out_edits(tiny(128, max_letters=6, max_lines=1, random_strings=0.0), 8, "text", seed=1)
    results = list(evaluate_edits(edited_by(editor, seed=0, **CALL), pairs, Reader(), batch=8))
    assert sum(r.score.exact for r in results) >= LEAST_WORDS, [(r.pair.instruction, r.read) for r in results]
    assert np.median([r.outside for r in results]) > 28


def test_its_vae_keeps_renderings(editor):
    unseen = [make(tiny(128, split="held_out"), 0, i).image for i in range(8)]
    pixels = torch.from_numpy(np.stack(unseen)).permute(0, 3, 1, 2).unsqueeze(2) / 127.5 - 1
    with torch.no_grad():
        back = editor.vae.decode(editor.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((back - pixels) / 2).square().flatten(1).mean(1)
    assert (-10 * errors.log10()).mean() > 28


def test_an_edit_leaves_the_rest_alone(editor):
    pairs = held_out_edits(tiny(128, max_letters=6), 4, "colour", seed=1)
    made = edited_by(editor, seed=0, **CALL)(pairs, 0)
    outside = [psnr_outside(image, pair.target, pair.mask) for image, pair in zip(made, pairs)]
    assert np.median(outside) > 26, outside


def test_it_follows_an_instruction_inside_a_mask(editor):
    """Drawn with the template that it was trained on; with Edit's the text keeps its colour mostly."""
    pipe = qwen_image_fast.QwenImageEditPlusInpaintPipeline(**{part: getattr(editor, part) for part in editor.parts})
    pairs = held_out_edits(tiny(128, max_letters=6), 4, "colour", seed=1)
    images, prompts = [p.source for p in pairs], [p.instruction for p in pairs]
    made = pipe(images, prompts, mask_image=np.ones((128, 128), bool), strength=1.0, seed=0, progress=False, **CALL)
    done = [seen_done(pair, np.asarray(image)) for pair, image in zip(pairs, made.images)]
    assert sum(done) >= 3, list(zip(prompts, done))


WHITE = np.zeros((128, 128), bool)
WHITE[64:, 64:] = True
EDITS = {
    "QwenImageInpaintPipeline": {"mask_image": WHITE, "strength": 1.0},
    "QwenImageEditInpaintPipeline": {"mask_image": WHITE, "strength": 1.0},
    "QwenImageEditPlusInpaintPipeline": {"mask_image": WHITE, "strength": 1.0},
    "QwenImageImg2ImgPipeline": {"strength": 0.1},
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_not_to_change_stays(editor, name):
    """They draw from the VAE's distribution: a deviation that nothing trained would cover the picture with noise."""
    cls, samples = getattr(qwen_image_fast, name), [make(tiny(128, split="held_out"), 0, i) for i in range(5)]
    pipe = cls(**{part: getattr(editor, part) for part in cls.parts})
    images, captions = [s.image for s in samples], [s.caption for s in samples]
    made = pipe(image=images, prompt=captions, seed=0, progress=False, **EDITS[name], **CALL).images
    kept = ~WHITE if "mask_image" in EDITS[name] else ~WHITE | WHITE
    errors = [np.square(np.float64(a)[kept] - np.float64(b)[kept]).mean() for a, b in zip(made, images)]
    decibels = -10 * np.log10(np.array(errors) / 255**2)
    assert np.median(decibels) >= 28 and decibels.min() >= 27.5, decibels


def test_the_mean_is_all_that_the_vae_draws(editor):
    distribution = editor.vae.encode(torch.rand(1, 3, 1, 64, 64) * 2 - 1).latent_dist
    assert (distribution.logvar == -20).all() and distribution.mean.std() > 0.1


def test_ship_rounds_the_weights_and_refuses_what_is_there(tmp_path, folder):
    size = ship(folder, tmp_path / "out")
    assert 0 < size <= LARGEST and not list(tmp_path.glob(".*"))
    assert QwenImagePipeline.from_pretrained(tmp_path / "out").transformer.proj_out.weight.dtype == torch.bfloat16
    with pytest.raises(FileExistsError, match="already there"):
        ship(folder, tmp_path / "out")


def test_ship_without_the_deviation_of_the_latents(tmp_path, folder):
    """All other weights are those of a plain one, bit for bit."""
    ship(folder, tmp_path / "plain")
    ship(folder, tmp_path / "mean", mean_only=True)
    for part in ("transformer", "vae"):
        plain, mean = (load_file(next((tmp_path / kind / part).glob("*.safetensors"))) for kind in ("plain", "mean"))
        changed = {name for name in plain if not torch.equal(plain[name], mean[name])}
        assert changed == ({"quant_conv.weight", "quant_conv.bias"} if part == "vae" else set())
    assert torch.equal(mean["quant_conv.weight"][:16], plain["quant_conv.weight"][:16])
    assert not mean["quant_conv.weight"][16:].any() and (mean["quant_conv.bias"][16:] == -20).all()


def test_ship_with_a_share_of_the_weights_before(tmp_path, folder):
    """Of twice the weights a half: all are 1.5 times what they were, rounded once; of another model: a sentence."""
    shutil.copytree(folder, tmp_path / "before")
    for path in (tmp_path / "before").rglob("*.safetensors"):
        save_file({n: t * 2 if t.is_floating_point() else t for n, t in load_file(path).items()}, path)
    ship(folder, tmp_path / "made", before=tmp_path / "before", share=0.5)
    for path in folder.rglob("*.safetensors"):
        own, made = load_file(path), load_file(tmp_path / "made" / path.relative_to(folder))
        for name, tensor in own.items():
            assert torch.equal(made[name], (1.5 * tensor.float()).to(torch.bfloat16)), name
    with pytest.raises(ValueError, match="share must be above 0 and below 1, got 1"):
        ship(folder, tmp_path / "all", before=tmp_path / "before", share=1.0)
    path = next((tmp_path / "before" / "vae").glob("*.safetensors"))
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="must be of one model, got two of which the vae differs"):
        ship(folder, tmp_path / "other", before=tmp_path / "before", share=0.5)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


def test_logs_and_results_of_runs_are_not_installed():
    root = Path(qwen_image_fast.__file__).parent
    kinds = {path.suffix for path in (root / "training" / "recipes").rglob("*") if path.is_file()}
    assert kinds == {".yaml"}
    assert not list((root / "training").resolve().rglob("*.jsonl"))

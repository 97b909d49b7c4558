"""The pipelines' methods take what diffusers' take: names, order and defaults."""

import inspect
from pathlib import Path

import diffusers
import pytest

import qwen_image_fast

OURS = [name for name in qwen_image_fast.__all__ if name.startswith("QwenImage") and name.endswith("Pipeline")]
ALONE = "QwenImageEditPlusInpaintPipeline"  # not in diffusers; its call is another pipeline's
NAMES = [name for name in OURS if name != ALONE]
OWN = {"seed", "progress", "preserve_size", "condition_area", "grid_positions"}
# Defaults that mean the same: lists as tuples, and a scale that no released model uses.
SAME = {
    "callback_on_step_end_tensor_inputs": (["latents"], ("latents",)),
    "components": (["transformer"], ("transformer",)),
    "guidance_scale": (1.0, None),
}


def parameters(function):
    """Those that diffusers has, with the default; `**kwargs` and our own by keyword only are left out."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.POSITIONAL_OR_KEYWORD}


def assert_same(ours, theirs):
    ours, theirs = parameters(ours), parameters(theirs)
    assert list(ours) == list(theirs)
    for name, default in theirs.items():
        assert ours[name] == default or (default, ours[name]) == SAME.get(name), name


@pytest.mark.parametrize("name", NAMES)
def test_pipelines(name):
    ours, theirs = getattr(qwen_image_fast, name), getattr(diffusers, name)
    assert_same(ours.__call__, theirs.__call__)
    assert_same(ours.__init__, theirs.__init__)
    assert list(parameters(ours.save_pretrained)) == list(parameters(theirs.save_pretrained))[:6]
    # Without a default there, though embeddings do as well.
    assert list(parameters(ours.encode_prompt).items())[2:] == list(parameters(theirs.encode_prompt).items())[2:]
    more = {p.name for p in inspect.signature(ours.__call__).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert {"seed", "progress"} <= more <= OWN


@pytest.mark.parametrize("name", NAMES)
def test_values_of_pipelines(name):
    """What a script may read; none of them needs a part."""
    ours, theirs = getattr(qwen_image_fast, name), getattr(diffusers, name)
    made = [cls(**dict.fromkeys(list(parameters(cls.__init__))[1:])) for cls in (ours, theirs)]
    for value in (
        "default_sample_size", "tokenizer_max_length", "prompt_template_encode", "prompt_template_encode_start_idx",
        "vae_scale_factor",
    ):  # fmt: skip
        assert getattr(made[0], value) == getattr(made[1], value), value
        with pytest.raises(AttributeError):
            setattr(made[0], value, 1)


def test_all_pipelines_of_diffusers_are_there():
    """Qwen-Image-2.1 is another model; modular pipelines are the drop-in's."""
    theirs = {n for n in dir(diffusers) if n.startswith("QwenImage") and n.endswith("Pipeline")}
    assert {n for n in theirs if "Modular" not in n and "21" not in n} == set(NAMES)
    calls = [getattr(qwen_image_fast, name).__call__ for name in (ALONE, "QwenImageEditInpaintPipeline")]
    assert calls[0] is calls[1]


def test_the_feature_table_lists_all():
    page = Path(__file__).parents[2] / "docs" / "features.md"
    table = "".join(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    assert [name for name in OURS if f"`{name}`" not in table] == []


def test_pipelines_are_short_and_share_one_loop():
    folder = Path(qwen_image_fast.__file__).parent / "pipelines"
    lines = {p.name: p.read_text(encoding="utf-8").splitlines() for p in folder.glob("*.py")}
    assert {name: len(text) for name, text in lines.items() if len(text) > 250} == {}
    assert [name for name, text in lines.items() if any(" denoise(" in line for line in text)] == ["generation.py"]


LORA = [
    "fuse_lora", "unfuse_lora", "unload_lora_weights", "set_adapters", "enable_lora", "disable_lora", "delete_adapters",
    "get_active_adapters", "get_list_adapters", "save_lora_weights",
]  # fmt: skip


@pytest.mark.parametrize("name", LORA)
def test_lora(name):
    assert_same(getattr(qwen_image_fast.QwenImagePipeline, name), getattr(diffusers.QwenImagePipeline, name))


def test_load_lora_weights():
    """The first parameter has a shorter name here."""
    ours, theirs = (parameters(p.QwenImagePipeline.load_lora_weights) for p in (qwen_image_fast, diffusers))
    assert list(ours.items())[2:] == list(theirs.items())[2:]

"""LoRA files: styles of keys, scales, where a file is found, and what is said of one that does not fit."""

import json

import pytest
import torch
from loras import CALL, LAYERS, STYLES, draw, pairs, state
from reference import reference, seeded
from safetensors.torch import load_file, save_file

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.models.lora import LoraLinear
from qwen_image_fast.models.lora_files import parse_lora
from qwen_image_fast.tensor_files import read_metadata


@pytest.fixture
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


@pytest.mark.parametrize("style", ["diffusers", "comfy", "comfy, A and B", "lightning", "kohya"])
def test_files_equal_diffusers(pipe, tiny_folder, tmp_path, style):
    before = draw(pipe)
    save_file(state(pairs(pipe), style), tmp_path / "x.safetensors")
    assert pipe.load_lora_weights(tmp_path / "x.safetensors") == "default_0"
    got = draw(pipe)
    theirs = reference("QwenImagePipeline", tiny_folder)
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    expected = theirs(**CALL, generator=seeded(0)).images
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_unknown_keys_are_left_out_and_named(pipe, caplog):
    pipe.load_lora_weights(state(pairs(pipe)))
    expected = draw(pipe)
    pipe.unload_lora_weights()
    more = {
        "transformer.transformer_blocks.77.attn.to_q.lora_A.weight": torch.ones(4, 128),
        "audio.oft_x": torch.ones(1),
    }
    with pytest.raises(ValueError, match="keys must be LoRA pairs of layers"):
        pipe.load_lora_weights({**state(pairs(pipe)), **more})
    pipe.load_lora_weights({**state(pairs(pipe)), **more}, strict=False)
    assert torch.equal(draw(pipe), expected)
    assert caplog.messages[-1:] == [
        f"load_lora_weights: left out, as they name no layer of the models: {', '.join(more)} (OFT: not supported)"
    ]
    with pytest.raises(ValueError, match="keys must be LoRA pairs of layers"):
        pipe.load_lora_weights(more, strict=False)


def test_saved_files_are_diffusers(pipe, tiny_folder, tmp_path):
    """Tensors and texts of the file; each package reads what the other wrote."""
    peft = pytest.importorskip("peft")
    theirs = reference("QwenImagePipeline", tiny_folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "net.2"], init_lora_weights=False)
    theirs.transformer.add_adapter(config)
    layers = peft.get_peft_model_state_dict(theirs.transformer)
    given = {"transformer_lora_layers": layers, "transformer_lora_adapter_metadata": config.to_dict()}
    for cls, folder in ((type(theirs), "theirs"), (QwenImagePipeline, "ours")):
        cls.save_lora_weights(tmp_path / folder, **given)
    files = [tmp_path / folder / "pytorch_lora_weights.safetensors" for folder in ("theirs", "ours")]
    a, b = map(load_file, files)
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
    a, b = (json.loads(read_metadata(file)["lora_adapter_metadata"]) for file in files)
    for text in (a, b):  # a set, which has no order
        text["transformer.target_modules"].sort()
    assert a == b
    pipe.load_lora_weights(tmp_path / "ours")
    torch.testing.assert_close(draw(pipe), theirs(**CALL, generator=seeded(0)).images, rtol=1e-3, atol=1e-3)


def test_saving_is_refused_in_one_sentence(tmp_path):
    layers = {"a": torch.ones(1)}
    with pytest.raises(ValueError, match="transformer_lora_layers must be given, got none"):
        QwenImagePipeline.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="^save_lora_weights: safe_serialization must be True"):
        QwenImagePipeline.save_lora_weights(tmp_path, layers, safe_serialization=False)
    QwenImagePipeline.save_lora_weights(tmp_path / "no", layers, is_main_process=False)
    assert not (tmp_path / "no").exists()
    seen = []
    QwenImagePipeline.save_lora_weights(
        tmp_path, layers, weight_name="x.safetensors", save_function=lambda *a: seen.append(a)
    )
    assert seen == [({"transformer.a": layers["a"]}, str(tmp_path / "x.safetensors"))]


@pytest.mark.parametrize("style", STYLES)
def test_all_styles_are_one_adapter(pipe, style):
    adapter = pairs(pipe)
    alpha = 2.0 if STYLES[style][2] else 4.0
    pipe.load_lora_weights(state(adapter, style, alpha), adapter_name="a")
    scale = 1.0 if STYLES[style][2] is None else 0.5
    for name, (a, b) in adapter.items():
        layer = pipe.transformer.get_submodule(name)
        assert type(layer) is LoraLinear
        torch.testing.assert_close(layer.mix[1] @ layer.mix[0], scale * b @ a)


def test_alpha_of_peft_and_of_diffusers_metadata(pipe, tmp_path):
    adapter = pairs(pipe)
    save_file(state(adapter, "peft"), tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipe.load_lora_weights(tmp_path)
    for name, scale in zip(LAYERS, (0.5, 2.0, 2.0)):
        layer = pipe.transformer.get_submodule(name)
        torch.testing.assert_close(layer.mix[1] @ layer.mix[0], scale * adapter[name][1] @ adapter[name][0])
    pipe.unload_lora_weights()
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12})}
    save_file(state(adapter), tmp_path / "m.safetensors", metadata=metadata)
    pipe.load_lora_weights(tmp_path, weight_name="m.safetensors")
    layer = pipe.transformer.get_submodule(LAYERS[1])
    torch.testing.assert_close(layer.mix[1] @ layer.mix[0], 3.0 * adapter[LAYERS[1]][1] @ adapter[LAYERS[1]][0])


def test_layers_of_one_file_may_differ(pipe):
    """In style of their keys, rank, dtype and alpha."""
    adapter, ranks = {}, (1, 4, 7)
    for name, rank in zip(LAYERS, ranks):
        adapter |= pairs(pipe, [name], rank)
    first, second, third = ({name: adapter[name]} for name in LAYERS)
    half = {k: v.bfloat16() if v.dim() else v for k, v in state(second, "kohya", alpha=0.0).items()}
    third = {k: v.half() for k, v in state(third, "lightning", alpha=torch.tensor(14, dtype=torch.int64)).items()}
    pipe.load_lora_weights({**state(first), **half, **third})
    for name, scale, kind in zip(LAYERS, (1.0, 0.0, 2.0), (torch.float32, torch.bfloat16, torch.float16)):
        down, up = (t.to(kind).float() for t in adapter[name])
        layer = pipe.transformer.get_submodule(name)
        torch.testing.assert_close(layer.mix[1] @ layer.mix[0], scale * up @ down, rtol=0, atol=1e-5)


PATTERNS = {
    "plain": ({}, 8 / 4),
    "end of the name": ({"to_q": 12}, 3.0),
    "regular expression": ({r"transformer_blocks\.\d+\.attn\.to_[qk]": 64}, 16.0),
    "from the start": ({r"^transformer_blocks\.0\.attn\.to_q": 20}, 5.0),
    "an alternative": ({"to_k|to_q": 40}, 10.0),
    "the first that matches": ({"to_v": 4, r".*to_q": 36, "to_q": 4}, 9.0),
    "no part of a word": ({"o_q": 64, "to": 64, "attn": 64, "0.attn.to_": 64}, 2.0),
    "^ after a dot": ({"^attn.to_q": 64}, 2.0),
}


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_are_those_of_peft(pipe, tiny_folder, tmp_path, case, rslora):
    """PEFT's own scale, and one known from its documentation."""
    from peft import LoraConfig, get_peft_model

    alphas, expected = PATTERNS[case]
    name = LAYERS[0]
    ranks = {pattern: 2 for pattern in alphas if case == "regular expression"}
    options = {"alpha_pattern": alphas, "rank_pattern": ranks, "use_rslora": rslora}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[name], init_lora_weights=False, **options)
    theirs = get_peft_model(reference("QwenImagePipeline", tiny_folder).transformer, config)
    theirs.save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    layer = theirs.base_model.model.get_submodule(name)
    scale = layer.scaling["default"]
    rank = 2 if ranks else 4
    assert scale == pytest.approx(expected * 4 / rank * (rank**0.5 if rslora else 1))
    mix = pipe.transformer.get_submodule(name).mix
    torch.testing.assert_close(mix[1] @ mix[0], layer.get_delta_weight("default").detach())


def test_scale_of_a_configuration(pipe):
    """PEFT's defaults of r and alpha are 8; a null alpha is none."""
    for config, expected in (
        ({"r": 4, "lora_alpha": None}, 1.0), ({"r": 4, "alpha_pattern": {"to_q": None}}, 1.0), ({"r": 4}, 2.0),
        ({"r": 4, "rank_pattern": None, "lora_alpha": 1}, 0.25), ({"use_rslora": True}, 4.0), ({}, 1.0),
    ):  # fmt: skip
        adapter = parse_lora(state(pairs(pipe, LAYERS[:1])), pipe.transformer, config)[LAYERS[0]]
        assert adapter.scale == expected, config
    for config, text in (
        ({"r": 8}, "to_q must have the rank of its configuration, 8, got 4"),
        ({"r": 8, "rank_pattern": {"to_[qk]": 2}}, "to_q must have the rank of its configuration, 2, got 4"),
        ({"lora_alpha": "8"}, "alpha of transformer_blocks.0.attn.to_q must be a finite number, got '8'"),
        ({"lora_alpha": float("nan")}, "alpha of .* must be a finite number, got nan"),
        ({"alpha_pattern": {"to_(q": 1}}, r"'to_\(q' must be a regular expression"),
    ):
        with pytest.raises(ValueError, match=text):
            parse_lora(state(pairs(pipe, LAYERS[:1])), pipe.transformer, config)


def test_null_alphas_in_a_file(pipe):
    """None is none; 0 in some layers is said by their trainer; 0 in all makes no adapter."""
    good = state(pairs(pipe), "lightning", alpha=4.0)
    pipe.load_lora_weights({k: None if "to_q.alpha" in k else t for k, t in good.items()}, "none")
    expected = draw(pipe)
    pipe.load_lora_weights(state(pairs(pipe), "peft"), "none", hotswap=True)
    assert torch.equal(draw(pipe), expected)
    for alpha, text in (
        (0.0, "alpha is 0 in every layer, which switches"),
        (float("nan"), "NaN or infinity in its alpha"),
    ):
        with pytest.raises(ValueError, match=text):
            pipe.load_lora_weights(state(pairs(pipe), "lightning", alpha=alpha))


def test_arguments_of_diffusers(pipe, tmp_path):
    """A subfolder's file, not the root's; what is not an argument is an error."""
    root, inner = (state(pairs(pipe, seed=seed)) for seed in range(2))
    (tmp_path / "v2").mkdir()
    save_file(root, tmp_path / "pytorch_lora_weights.safetensors")
    save_file(inner, tmp_path / "v2" / "pytorch_lora_weights.safetensors")
    named = {f"style.{k}": t for k, t in inner.items()} | root
    drawn = {}
    for name, source, options in (
        ("inner", inner, {}),
        ("subfolder", tmp_path, {"subfolder": "v2"}),
        ("file", tmp_path, {"subfolder": "v2", "weight_name": "pytorch_lora_weights.safetensors"}),
        ("path", tmp_path, {"weight_name": "v2/pytorch_lora_weights.safetensors"}),
        ("prefix", named, {"prefix": "style"}),
        ("all", tmp_path / "v2", {"low_cpu_mem_usage": False, "use_safetensors": True, "local_files_only": True}),
    ):
        pipe.load_lora_weights(source, adapter_name=name, **options)
        pipe.set_adapters(name)
        drawn[name] = draw(pipe)
        assert torch.equal(drawn[name], drawn["inner"]), name
    pipe.load_lora_weights(tmp_path, adapter_name="root")
    pipe.set_adapters("root")
    assert not torch.equal(draw(pipe), drawn["inner"])
    for source, options, kind, text in (
        (tmp_path, {"subfolde": "v2"}, TypeError, "there is no argument 'subfolde'; did you mean subfolder?"),
        (root, {"scale": 0.5}, TypeError, "there is no argument 'scale'; there are source, adapter_name, hotswap"),
        (tmp_path, {"force_download": True}, TypeError, "there is no argument 'force_download'"),
        (tmp_path, {"subfolder": "v3"}, FileNotFoundError, "has no subfolder 'v3'; subfolders there: v2"),
        (tmp_path, {"use_safetensors": False}, ValueError, "use_safetensors must be True or None"),
        (root, {"subfolder": "v2"}, ValueError, "weight_name and subfolder must not be given with tensors"),
        (
            tmp_path / "v2" / "pytorch_lora_weights.safetensors",
            {"subfolder": "v2"},
            ValueError,
            "must be of a folder, got the file",
        ),
        (root, {"prefix": "style"}, ValueError, "got none at all"),
    ):
        with pytest.raises(kind, match=text):
            pipe.load_lora_weights(source, **options)


def test_a_revision_of_a_local_folder_is_said_to_have_no_effect(pipe, tmp_path, caplog):
    save_file(state(pairs(pipe)), tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path, revision="v2")
    assert "revision has no effect" in caplog.text


def test_pickles_and_missing_files(pipe, tmp_path, monkeypatch):
    pickled = "is a pickle, which can run code, .*convert it: safetensors.torch.save_file"
    for suffix in (".bin", ".pt", ".ckpt", ".pth"):
        torch.save(state(pairs(pipe)), tmp_path / f"x{suffix}")
        with pytest.raises(ValueError, match=rf"x{suffix} {pickled}"):
            pipe.load_lora_weights(tmp_path / f"x{suffix}")
        with pytest.raises(ValueError, match=rf"x{suffix} {pickled}"):
            pipe.load_lora_weights(tmp_path, weight_name=f"x{suffix}")
    with pytest.raises(ValueError, match=pickled):  # of a folder with nothing else
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "x.bin").rename(tmp_path / "named.safetensors")
    with pytest.raises(ValueError, match=rf"named.safetensors {pickled}"):
        pipe.load_lora_weights(tmp_path / "named.safetensors")
    (tmp_path / "named.safetensors").unlink()
    (tmp_path / "v2").mkdir()
    save_file(state(pairs(pipe)), tmp_path / "oil-painting.safetensors")
    save_file(state(pairs(pipe)), tmp_path / "v2" / "ink.safetensors")
    monkeypatch.chdir(tmp_path)
    for source, options, text in (
        ("oil-paintin.safetensors", {}, "oil-paintin.safetensors; did you mean oil-painting.safetensors"),
        (tmp_path / "oilpainting.safetensors", {}, "oilpainting.safetensors; did you mean oil-painting.safetensors"),
        (tmp_path, {"weight_name": "ink.safetensors"}, "ink.safetensors; did you mean v2/ink.safetensors"),
        ("./zz.safetensors", {}, "zz.safetensors; the folder has oil-painting.safetensors, v2/ink.safetensors"),
        ("nowhere/zz.safetensors", {}, "there is no file nowhere/zz.safetensors, and no folder nowhere"),
        ("zz.bin", {}, "there is no file zz.bin"),
    ):
        with pytest.raises(FileNotFoundError, match=text):
            pipe.load_lora_weights(source, **options)


@pytest.mark.parametrize("named", ["in the source", "by weight_name"])
def test_one_file_of_a_hub_repository_is_downloaded(pipe, tmp_path, monkeypatch, named):
    """Repositories of LoRAs hold many, of gigabytes each."""
    asked = []
    monkeypatch.setattr(
        "qwen_image_fast.models.lora_files.resolve_folder",
        lambda name, allow_patterns, **hub: asked.append((name, allow_patterns, hub)) or tmp_path,
    )
    (tmp_path / "v1").mkdir()
    for name in ("v1/4-steps.safetensors", "other.safetensors"):
        save_file(state(pairs(pipe)), tmp_path / name)
    if named == "in the source":
        pipe.load_lora_weights("owner/Lightning/v1/4-steps.safetensors", revision="main")
    else:
        pipe.load_lora_weights("owner/Lightning", weight_name="v1/4-steps.safetensors", revision="main")
    patterns = ["v1/4-steps.safetensors", "*adapter_config.json"]
    unsaid = {"cache_dir": None, "token": None, "local_files_only": None}
    assert asked == [("owner/Lightning", patterns, {"revision": "main", **unsaid})]


def test_errors(pipe, tmp_path):
    good = state(pairs(pipe))
    first = next(iter(good))
    to_q, to_k, norm_q = LAYERS[0], "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.norm_q"
    cases = {
        "keys must be LoRA pairs of layers of QwenImageTransformer2DModel, got double_blocks.0.lora_A.weight": {
            "double_blocks.0.lora_A.weight": torch.ones(2, 2)
        },
        "got transformer.x.dora_scale": {**good, "transformer.x.dora_scale": torch.ones(3)},
        r"to_q.hada_t1, .*to_q.lokr_t2 \(Tucker decompositions, for convolutions: not supported\)": {
            f"{to_q}.hada_t1": torch.ones(3, 3, 1, 1), f"{to_q}.lokr_t2": torch.ones(3, 3, 1, 1)
        },
        r"to_q.oft_blocks \(OFT: not supported\)": {**good, f"{to_q}.oft_blocks": torch.ones(3)},
        "to_q must have one adapter, got diff and lora_A and lora_B": {**good, f"{to_q}.diff": torch.ones(192, 192)},
        "to_q must have an adapter beside its alpha": {f"{to_q}.alpha": torch.ones(())},
        "the magnitude of .*to_q must be .192, 1. or .1, 192., got .3, 1.": {
            **good, f"{to_q}.dora_scale": torch.ones(3)
        },
        "to_k must have an adapter beside its magnitude": {
            f"{to_k}.dora_scale": torch.ones(192), f"{to_k}.diff_b": torch.ones(192)
        },
        "to_q must have hada_w1_a, hada_w1_b, .* got no hada_w2_b": {
            f"{to_q}.hada_{part}": torch.ones(192, 192) for part in ("w1_a", "w1_b", "w2_a")
        },
        r"both products of .*to_q must be \[192, 192\], got matrices of \[3, 3\]": {
            f"{to_q}.hada_{part}": torch.ones(3, 3) for part in ("w1_a", "w1_b", "w2_a", "w2_b")
        },
        r"the factors of .*to_q must multiply to \[192, 192\], got \[3, 3\] and \[4, 4\]": {
            f"{to_q}.lokr_w1": torch.ones(3, 3), f"{to_q}.lokr_w2": torch.ones(4, 4)
        },
        "to_q must have lokr_w1 or two matrices of it, got both": {
            f"{to_q}.lokr_w1": torch.ones(3, 3), f"{to_q}.lokr_w1_a": torch.ones(4, 4)
        },
        "to_q must have both matrices of its pair, got no lokr_w2_a": {f"{to_q}.lokr_w1": torch.ones(3, 3)},
        r"the difference of .*to_q must be \[192, 192\], got \[3\]": {f"{to_q}.diff": torch.ones(3)},
        r"the bias of .*to_q must be \[192\], got \[3\]": {f"{to_q}.diff_b": torch.ones(3)},
        "norm_q is a norm, for which a file may only hold a difference, got diff, diff_b": {
            f"{norm_q}.diff": torch.ones(32), f"{norm_q}.diff_b": torch.ones(32)
        },
        "attn.to_q must have one adapter, got a second one with diffusion_model.transformer_blocks.0.attn.to_q": {
            **good, **state(pairs(pipe), "comfy")
        },
        r"got \[0, 192\] and": {k: v[:0] if "_A" in k else v[:, :0] for k, v in good.items()},
        "attn.to_q must hold finite numbers, got NaN or infinity": {**good, first: good[first] * float("nan")},
        "attn.to_q must hold floating-point numbers, got torch.int8": {**good, first: good[first].to(torch.int8)},
        "alpha of transformer_blocks.0.attn.to_q must be one number, got 2": {
            **good, f"{to_q}.alpha": torch.ones(2)
        },
        "got none at all": {},
        r"transformer_blocks.0.attn.to_q must be \[rank, 192\] and \[192, rank\], got \[4, 3072\] and": {
            **good, first: torch.ones(4, 3072)
        },
        "transformer_blocks.0.attn.to_q must have both matrices of its pair, got no lora_A": {
            k: v for k, v in good.items() if k != first
        },
    }  # fmt: skip
    for text, lora in cases.items():
        with pytest.raises(ValueError, match=text):
            pipe.load_lora_weights(lora)
    pipe.load_lora_weights(good, adapter_name="a")
    with pytest.raises(ValueError, match="adapter_name must be new, got 'a', which is loaded"):
        pipe.load_lora_weights(good, adapter_name="a")
    with pytest.raises(ValueError, match=r"adapters must be of those that are there \(a\), got b"):
        pipe.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="adapter_weights must be one for all or one for each of 1, got 2"):
        pipe.set_adapters(["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match="adapter_weights must be finite, got {'a': nan}"):
        pipe.set_adapters(["a"], float("nan"))
    with pytest.raises(ValueError, match="adapter_name must be loaded to be swapped, got 'b'"):
        pipe.load_lora_weights(good, "b", hotswap=True)
    with pytest.raises(ValueError, match=r"components must be \['transformer'\], with 'text_encoder' or without"):
        pipe.fuse_lora(["text_encoder"])
    with pytest.raises(FileNotFoundError, match="holds no LoRA: it has no safetensors file"):
        pipe.load_lora_weights(tmp_path)
    save_file(good, tmp_path / "m.safetensors", metadata={"lora_adapter_metadata": "{nothing"})
    with pytest.raises(ValueError, match="lora_adapter_metadata of .*m.safetensors must be a JSON object"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\1nothing")
    with pytest.raises(ValueError, match="is truncated or not safetensors"):
        pipe.load_lora_weights(tmp_path / "x.safetensors")

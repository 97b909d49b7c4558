"""Every kind of adapter against its formula in float64, and against PEFT where PEFT can make one."""

import pytest
import torch
from loras import CALL, LAYERS, MODULATION, draw, pairs, state
from reference import reference, seeded

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.models.lora import LoraLinear

NORM = "transformer_blocks.1.attn.norm_added_k"


@pytest.fixture
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


def rand(*shape):
    return torch.randn(*shape) / shape[-1] ** 0.5


def magnitudes(weight, rows):
    """Those of the weight itself, up to 30 % off."""
    norm = weight.norm(dim=1 if rows else 0, keepdim=True)
    return norm * (1 + 0.3 * torch.randn(norm.shape))


def divisor(number):
    """Of a Kronecker factor: 8 of 192, 12 of 1152."""
    return {192: 8, 384: 6, 768: 16, 1152: 12}[number]


# Each: tensors of a layer by key ending, from its weight; and the change by the kind's formula, of float64 tensors.
def lora(w):
    return {"lora_down.weight": rand(3, w.shape[1]), "lora_up.weight": rand(w.shape[0], 3), "alpha": torch.tensor(6.0)}


def lora_change(w, t):
    return 2 * t["lora_up.weight"] @ t["lora_down.weight"]


def loha(w, rank=3, alpha=6.0):
    sides = {
        f"hada_w{k}_{s}": rand(*((w.shape[0], rank) if s == "a" else (rank, w.shape[1]))) for k in (1, 2) for s in "ab"
    }
    return {**sides, "alpha": torch.tensor(alpha)}


def loha_change(w, t):
    scale = t["alpha"] / len(t["hada_w1_b"])
    return scale * torch.einsum("or,ri,os,si->oi", t["hada_w1_a"], t["hada_w1_b"], t["hada_w2_a"], t["hada_w2_b"])


def lokr(w, first=None, second=2):
    """first, second: ranks of the factors; None: whole."""
    a, b = (divisor(n) for n in w.shape)
    shapes = {"lokr_w1": (a, b, first), "lokr_w2": (w.shape[0] // a, w.shape[1] // b, second)}
    out = {"alpha": torch.tensor(4.0)}
    for name, (rows, columns, rank) in shapes.items():
        if rank is None:
            out[name] = rand(rows, columns)
        else:
            out |= {f"{name}_a": rand(rows, rank), f"{name}_b": rand(rank, columns)}
    return out


def lokr_change(w, t):
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    ranks = [t[f"lokr_w{k}_b"].shape[0] for k in (1, 2) if f"lokr_w{k}_b" in t]
    scale = 4 / ranks[-1] if ranks else 1.0
    return scale * torch.einsum("ab,cd->acbd", first, second).reshape(w.shape)


def dora(kind, rows):
    def tensors(w):
        magnitude = magnitudes(w, rows)
        return {**kind(w), "dora_scale": magnitude}

    return tensors


def dora_change(change, rows):
    def decomposed(w, t):
        changed = w + change(w, t)
        return t["dora_scale"] * changed / (changed**2).sum(1 if rows else 0, keepdim=True).sqrt() - w

    return decomposed


KINDS = {
    "LoRA": (lora, lora_change),
    "LoHa": (loha, loha_change),
    "LoHa of a high rank": (lambda w: loha(w, rank=40), loha_change),
    "LoKr, second factored": (lokr, lokr_change),
    "LoKr, whole": (lambda w: lokr(w, None, None), lokr_change),
    "LoKr, first factored": (lambda w: lokr(w, 2, None), lokr_change),
    "LoKr, both factored": (lambda w: lokr(w, 1, 2), lokr_change),
    "DoRA of rows": (dora(lora, True), dora_change(lora_change, True)),
    "DoRA of columns": (dora(lora, False), dora_change(lora_change, False)),
    "DoRA of LoHa": (dora(loha, True), dora_change(loha_change, True)),
    "DoRA of LoKr": (dora(lokr, False), dora_change(lokr_change, False)),
    "difference": (lambda w: {"diff": rand(*w.shape)}, lambda w, t: t["diff"]),
}


def adapter(pipe, kind, layers, seed=0, style="diffusion_model."):
    torch.manual_seed(seed)
    make = KINDS[kind][0]
    weights = {name: pipe.transformer.get_submodule(name).weight.detach() for name in layers}
    return {f"{style}{name}.{part}": t for name, w in weights.items() for part, t in make(w).items()}


def change(kind, weight, tensors, name):
    """Of a layer, in float64."""
    own = {key.split(f"{name}.")[1]: t.double() for key, t in tensors.items() if f".{name}." in key}
    return KINDS[kind][1](weight.detach().double(), own)


@pytest.mark.parametrize("kind", KINDS)
def test_formula(pipe, kind):
    """Active, at half the weight, beside another, fused and taken out, on a square and on other layers."""
    names = [*LAYERS[:1], LAYERS[2], MODULATION[3]]
    tensors, other = adapter(pipe, kind, names), adapter(pipe, "DoRA of rows", names, seed=1)
    layers = {name: pipe.transformer.get_submodule(name) for name in names}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    pipe.load_lora_weights(tensors, "a")
    pipe.load_lora_weights(other, "b")
    for shares, fused in (({"a": 1.0}, 0), ({"a": 0.5}, 0), ({"a": 0.5, "b": -0.75}, 0), ({"a": 0.5, "b": -0.75}, 1)):
        pipe.set_adapters(list(shares), list(shares.values()))
        if fused:
            pipe.fuse_lora()
        for name, layer in layers.items():
            x = torch.randn(5, layer.in_features)
            w = before[name].double()
            for which, share in shares.items():
                of = (kind, tensors) if which == "a" else ("DoRA of rows", other)
                w = w + share * change(of[0], before[name], of[1], name)
            expected = x.double() @ w.T + layer.bias.detach().double()
            error = (layer(x).detach() - expected).abs().max()
            assert error < 2e-5 * expected.abs().max(), (name, shares, fused)
            assert type(layer) is (torch.nn.Linear if fused else LoraLinear)
    pipe.unfuse_lora()
    pipe.disable_lora()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight.detach(), before[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "kind", ["LoHa", "LoKr, second factored", "DoRA of rows", "DoRA of columns", "DoRA of LoKr", "difference"]
)
def test_pictures(pipe, tiny_folder, kind):
    """That of changed weights; put in another's place, fused and taken out; in bfloat16 near it."""
    before = draw(pipe)
    tensors = adapter(pipe, kind, MODULATION)
    pipe.load_lora_weights(adapter(pipe, "LoHa", MODULATION, seed=3), "x")
    pipe.load_lora_weights(tensors, "x", hotswap=True)
    got = draw(pipe)
    other = QwenImagePipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        for name in MODULATION:
            weight = other.transformer.get_submodule(name).weight
            weight += change(kind, weight, tensors, name).float()
    expected = draw(other)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=1e-4)
    other = QwenImagePipeline.from_pretrained(tiny_folder)
    other.load_lora_weights(tensors)
    other.to(torch.bfloat16)
    assert (draw(other).float() - expected).abs().mean() < 0.1 * (expected - before).abs().mean() + 0.02


def test_biases_and_norms(pipe):
    """Differences of biases and of norms, PEFT's bias of B; a norm's own weight returns as it was."""
    before, name = draw(pipe), LAYERS[0]
    layer, norm = pipe.transformer.get_submodule(name), pipe.transformer.get_submodule(NORM)
    own, bias, text = norm.weight, layer.bias.clone(), "lora_unet_" + NORM.replace(".", "_")
    (down, up), b, d = pairs(pipe, [name])[name], torch.randn(192), torch.randn(32)
    peft = {
        f"{name}.lora_A.weight": down,
        f"{name}.lora_B.weight": up,
        f"{name}.lora_B.bias": b,
        f"{name}.alpha": torch.tensor(8.0),
    }
    for tensors, wanted in (
        ({f"{name}.diff_b": b, f"{text}.diff": d}, 1.0),
        ({f"{name}.b_norm": b, f"{text}.w_norm": d}, 1.0),
        ({**peft, f"{NORM}.diff": d}, 2.0),
    ):
        pipe.load_lora_weights(tensors, "x")
        pipe.set_adapters("x", 0.5)
        x = torch.randn(3, 192)
        pair = 2 * up @ down if "lora_A" in str(tensors) else torch.zeros(192, 192)
        expected = x @ (layer.weight + 0.5 * pair).T + bias + 0.5 * wanted * b
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.weight, own + 0.5 * d)
        active = draw(pipe)
        assert (active - before).abs().max() > 1e-3
        pipe.fuse_lora()
        torch.testing.assert_close(layer.bias, bias + 0.5 * wanted * b)
        torch.testing.assert_close(draw(pipe), active, rtol=0, atol=5e-5)
        pipe.unfuse_lora()
        pipe.disable_lora()
        torch.testing.assert_close(draw(pipe), before, rtol=0, atol=5e-5)
        pipe.unload_lora_weights()
        with torch.no_grad():  # what rounding has left
            layer.bias.copy_(bias)
    pipe.load_lora_weights({f"{text}.diff": d}, "x")
    pipe.to(torch.bfloat16)
    pipe.unload_lora_weights()
    assert norm.weight is own and norm.weight.dtype == torch.bfloat16


def peft_configs():
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    common = {"target_modules": LAYERS, "init_lora_weights": False}
    lycoris = {"target_modules": LAYERS, "init_weights": False, "r": 4, "alpha": 6}
    pattern = {"alpha_pattern": {r".*\.attn\.to_q": 3}, "rank_pattern": {"net.2": 2}}
    return {
        "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True, **common),
        "DoRA, rslora, patterns": LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True, **pattern, **common),
        "LoRA with biases": LoraConfig(r=4, lora_alpha=6, lora_bias=True, **common),
        "LoHa": LoHaConfig(**pattern, **lycoris),
        "LoKr": LoKrConfig(**pattern, **lycoris),
        "LoKr, both factored": LoKrConfig(decompose_both=True, decompose_factor=8, **{**lycoris, "r": 2}),
        "LoKr, whole": LoKrConfig(**{**lycoris, "r": 400}),
    }


PEFT = ["DoRA", "DoRA, rslora, patterns", "LoRA with biases", "LoHa", "LoKr", "LoKr, both factored", "LoKr, whole"]


@pytest.mark.parametrize("name", PEFT)
def test_adapters_that_peft_saves(pipe, tiny_folder, tmp_path, name):
    """The folder of PEFT's `save_pretrained`; its own model's picture."""
    from peft import get_peft_model

    torch.manual_seed(3)
    theirs = reference("QwenImagePipeline", tiny_folder)
    model = get_peft_model(theirs.transformer, peft_configs()[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter *= 1.2
            elif "lora_B" in key:
                parameter.normal_()
            elif "_b." in key or "lokr_w2." in key:
                parameter *= 8
    model.save_pretrained(tmp_path)
    before, expected = draw(pipe), theirs(**CALL, generator=seeded(0)).images
    pipe.load_lora_weights(tmp_path)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)


def test_a_dora_beside_forgotten_adapters_stays_fused(pipe):
    pipe.load_lora_weights(state(pairs(pipe)), "a")
    pipe.load_lora_weights(adapter(pipe, "DoRA of rows", LAYERS), "b")
    pipe.fuse_lora()
    fused = draw(pipe)
    pipe.delete_adapters("a")
    with pytest.raises(ValueError, match="unfuse_lora: a DoRA adapter that was fused beside another .* load the model"):
        pipe.unfuse_lora()
    assert torch.equal(draw(pipe), fused)


@pytest.mark.parametrize("kind", ["DoRA of rows", "DoRA of columns", "LoKr, second factored", "difference"])
def test_released_modulation_weights(tiny_folder, pipe, kind):
    """They are read again, and what was fused one after the other is fused again in that order."""
    freed = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    tensors = {name: adapter(pipe, kind, MODULATION, seed) for seed, name in enumerate("ab")}
    for p in (freed, pipe):
        draw(p)
        for name in "ab":
            p.load_lora_weights(tensors[name], name)
            p.fuse_lora()
        draw(p)
        p.delete_adapters("a")
    expected = draw(pipe, num_inference_steps=3)
    assert freed.transformer.modulation_tables.freed
    torch.testing.assert_close(draw(freed, num_inference_steps=3), expected, rtol=0, atol=1e-4)

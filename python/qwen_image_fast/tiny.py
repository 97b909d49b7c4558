"""A Qwen-Image small enough to train on a laptop: the same graph, folder layout and templates with 8 M parameters.

Sizes: five MMDiT blocks of 6 heads x 32, a VAE of base width 8, a Qwen2.5-VL of two layers of width 128. The tokenizer
is new, because the released one merges letters into words and so hides spelling from a small model.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from .checkpoint import save_state
from .model_defaults import GENERATION_FILE
from .models.text_encoder import EDIT_PLUS_PICTURE, EDIT_TEMPLATE, T2I_TEMPLATE
from .models.vision import VisionProcessor

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_HAN_PUNCTUATION = "，。、；：？！“”‘’（）《》〈〉「」『』【】—…·～￥\u3000"
# Words of the captions and instructions of `training.synthesis`, each with the space before it.
_CAPTION_WORDS = """
a above add an and at background black blue bottom brown center change circle color dark displaying erase green grey
ground in is it keep left light make middle move of on orange picture pink purple red remove replace reproduce right
square star text the to top triangle turned white with yellow
"""


def tiny_tokenizer():
    """transformers' `Qwen2Tokenizer` over a vocabulary in which a token is a character.

    Qwen2's format: byte-level BPE with its pre-tokenization and control tokens. One token each are: every byte, hence
    every ASCII letter, digit and mark; the 3,755 Han characters of GB2312's first level, and common Chinese
    punctuation; the words of the prompt templates, as in the released tokenizer, so that the templates begin with
    exactly 34 and 64 tokens; and, after a space, the words of captions, so that a quoted word, which follows a
    quotation mark, is spelled, while " red" is one token to learn a colour from. Any other character is two or more
    tokens. Decoding returns the text, in Unicode normal form C as in Qwen2.

    These words are added tokens, not merges: merges towards " the" would also join the space and "t" of " tin".
    They are matched wherever they occur, also inside a longer word (" a" in " apple", "color" in "colorful"): the
    whole-word flag of added tokens is read differently by transformers 4's slow tokenizer.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def tiny_configs() -> dict[str, dict]:
    """Contents of the configuration files: keys `transformer`, `vae`, `scheduler`, `text_encoder`.

    The first two are also the constructor arguments of the models. All values that are not sizes are the released ones.
    """
    vocab, _, added = _vocabulary()
    token_id = {token: len(vocab) + i for i, token in enumerate(added)}
    return {
        "transformer": {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 5,
            "attention_head_dim": 32,
            "num_attention_heads": 6,
            "joint_attention_dim": 128,
            "guidance_embeds": False,
            "axes_dims_rope": [8, 12, 12],
        },
        "vae": {
            "base_dim": 8,
            "z_dim": 16,
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_scales": [],
            "temperal_downsample": [False, True, True],
            "dropout": 0.0,
            "latents_mean": [
                *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
                *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
            ],
            "latents_std": [
                *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
                *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
            ],
        },
        "scheduler": {
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "invert_sigmas": False,
            "max_image_seq_len": 8192,
            "max_shift": 0.9,
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "stochastic_sampling": False,
            "time_shift_type": "exponential",
            "use_beta_sigmas": False,
            "use_dynamic_shifting": True,
            "use_exponential_sigmas": False,
            "use_karras_sigmas": False,
        },
        # Flat, as Qwen2.5-VL was released: every transformers version reads this form.
        "text_encoder": {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": token_id["<|endoftext|>"],
            "eos_token_id": token_id["<|im_end|>"],
            "hidden_act": "silu",
            "hidden_size": 128,
            "image_token_id": token_id["<|image_pad|>"],
            "initializer_range": 0.02,
            "intermediate_size": 256,
            "max_position_embeddings": 32768,
            "max_window_layers": 2,
            "model_type": "qwen2_5_vl",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_cache": True,
            "use_sliding_window": False,
            "video_token_id": token_id["<|video_pad|>"],
            "vision_config": {
                "depth": 2,
                "fullatt_block_indexes": [1],
                "hidden_act": "silu",
                "hidden_size": 64,
                "in_channels": 3,
                "in_chans": 3,
                "intermediate_size": 128,
                "model_type": "qwen2_5_vl",
                "num_heads": 2,
                "out_hidden_size": 128,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "window_size": 112,
            },
            "vision_end_token_id": token_id["<|vision_end|>"],
            "vision_start_token_id": token_id["<|vision_start|>"],
            "vocab_size": len(vocab) + len(added),
        },
    }


def write_untrained(folder: str | Path, seed: int = 0, *, edit: bool = False) -> None:
    """Write the tiny Qwen-Image with random float32 weights in the layout of `QwenImagePipeline.from_pretrained`.

    The weights depend on the seed and the parameters' names and shapes only: normal with variance 1/fan-in, half
    that deviation for the modulation, zero biases, unit norms. The folder appears when complete.

    Args:
        folder: must not exist, or be empty.
        seed: of the weights.
        edit: the layout of `QwenImageEditPlusPipeline.from_pretrained`: also the processor of pictures.

    Raises:
        FileExistsError: `folder` holds something.
    """
    from .models.transformer import QwenImageTransformer2DModel
    from .models.vae import AutoencoderKLQwenImage

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"write_untrained: folder must be empty or not exist, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    configs = tiny_configs()
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, model_class in (("transformer", QwenImageTransformer2DModel), ("vae", AutoencoderKLQwenImage)):
            with torch.random.fork_rng(devices=[]):  # constructors draw weights, which are replaced
                model = model_class(**configs[name])
            _randomise(model, seed)
            model.save_pretrained(building / name)
        _write_text_encoder(building / "text_encoder", seed)
        _write_tokenizer(building / "tokenizer")
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.34.0"}
        _write_json(building / "scheduler" / "scheduler_config.json", scheduler | configs["scheduler"])
        index = {
            "_class_name": "QwenImageEditPlusPipeline" if edit else "QwenImagePipeline",
            "_diffusers_version": "0.34.0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage"],
        }
        if edit:
            index["processor"] = ["transformers", "Qwen2VLProcessor"]
            _write_tokenizer(building / "processor")
            _write_processor(building / "processor")
        _write_json(building / "model_index.json", index)
        _write_json(building / GENERATION_FILE, {"width": 128, "height": 128, "steps": 20, "cfg": 1.0})
        building.chmod(0o755)  # mkdtemp's folders are private
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _randomise(model: nn.Module, seed: int) -> None:
    """Draw all parameters in the order of their names, so that the order of construction does not matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1 or name.endswith("gamma"):
            nn.init.ones_(parameter)
        else:
            # Modulation starts small, near the identity, but not at zero: images of untrained weights must depend on
            # the prompt and the timestep.
            gain = 0.5 if re.search(r"(img_mod|txt_mod|norm_out\.linear)\.", name) else 1.0
            std = gain / parameter[0].numel() ** 0.5
            nn.init.normal_(parameter, std=std, generator=generator)


def _write_text_encoder(folder: Path, seed: int) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = tiny_configs()["text_encoder"]
    _write_json(folder / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config))
    _randomise(model, seed)
    released = {name.replace("language_model.", "model.", 1): tensor for name, tensor in model.state_dict().items()}
    save_state(released, folder, base_name="model")


def _write_tokenizer(folder: Path) -> None:
    vocab, merges, added = _vocabulary()
    decoder = {str(len(vocab) + i): {"content": token} | flags for i, (token, flags) in enumerate(added.items())}
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write_json(folder / "added_tokens.json", {token: len(vocab) + i for i, token in enumerate(added)})
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": list(_SPECIAL[1:])}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 32768,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
        | special,
    )


def _write_processor(folder: Path) -> None:
    """The pictures' part of transformers' Qwen2VLProcessor; the tokenizer's part is there."""
    common = {
        "processor_class": "Qwen2VLProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        **asdict(VisionProcessor(max_pixels=84 * 84)),  # nine tokens for a picture of any size
    }
    _write_json(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **common})
    _write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor", **common})


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[str], dict[str, dict[str, bool]]]:
    """BPE vocabulary (token → id), merges in order of rank, and added tokens (content → flags), whose ids follow."""
    letters = _byte_letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    merges = []
    for character in _han_characters() + _HAN_PUNCTUATION:
        token, *rest = (letters[byte] for byte in character.encode())
        for letter in rest:
            if token + letter not in vocab:  # characters share their leading bytes
                vocab[token + letter] = len(vocab)
                merges.append(f"{token} {letter}")
            token += letter
    added = {token: _flags(special=True) for token in _SPECIAL}
    # A word after a space takes the space, as in the released vocabulary; so do " (", ")," and "'s".
    for template in (T2I_TEMPLATE, EDIT_TEMPLATE, EDIT_PLUS_PICTURE):
        for word in re.findall(r"'s| ?[A-Za-z]+| \(|\),", re.sub(r"<\|\w+\|>|\{\}", "\n", template)):
            added[word] = _flags(special=False)
    added |= {f" {word}": _flags(special=False) for word in _CAPTION_WORDS.split()}
    return vocab, merges, added


def _flags(special: bool) -> dict[str, bool]:
    return {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's assignment)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _han_characters() -> str:
    """First level of GB2312, rows 16 to 55: the 3,755 characters in common use, in order of their Pinyin."""
    codes = (bytes((row, cell)) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    return "".join(code.decode("gb2312", errors="ignore") for code in codes)


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""stable-diffusion.cpp's step on two blocks, in a process of its own that steps when its parent writes a line.

    python -m benchmarks.cpu_peers_sd FOLDER --size 256 [--threads 1]

`write_files` makes what it loads: a GGUF file of the transformer in Q8_0 with random blocks, a text encoder of one
layer of the released width and a VAE of the released shape, both of zeros and sparse, since neither is measured. A step
ends with the library's progress callback, which answers with its seconds and waits for the next line; the picture of
the last step is not decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_image_fast.weights.names import _VAE_ENDS, _VAE_STARTS

WIDTH, VOCABULARY, FEED = 3584, 152064, 18944  # of the released text encoder
KEYS = 512  # of its key and value projections
PROMPT = " ".join(["cat"] * 25)  # 30 tokens with the five that follow a prompt
NAMES = ("transformer.gguf", "text.safetensors", "vae.safetensors")


def write_files(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """The three files of `NAMES`; shapes: of the transformer's tensors by diffusers' names."""
    write_transformer(folder / NAMES[0], shapes)
    write_zeros(folder / NAMES[1], dict(text_shapes()))
    write_zeros(folder / NAMES[2], vae_shapes())


def write_transformer(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen_image")
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = np.full(shape, float("norm" in name), np.float32)
            writer.add_tensor(f"model.diffusion_model.{name}", values)
            continue
        blocks = rng.integers(0, 256, (shape[0], shape[1] // 32, 34), dtype=np.uint8)
        scale = np.array([shape[1] ** -0.5 / 74], np.float16)  # so that the weights' rms is 1 / sqrt(inputs)
        blocks[..., :2] = scale.view(np.uint8)
        writer.add_tensor(
            f"model.diffusion_model.{name}", blocks.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    yield "model.norm.weight", (WIDTH,)
    layer = "model.layers.0"
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{layer}.{name}.weight", (WIDTH,)
    for name, rows in (("q_proj", WIDTH), ("k_proj", KEYS), ("v_proj", KEYS)):
        yield f"{layer}.self_attn.{name}.weight", (rows, WIDTH)
        yield f"{layer}.self_attn.{name}.bias", (rows,)
    yield f"{layer}.self_attn.o_proj.weight", (WIDTH, WIDTH)
    for name, shape in (("gate_proj", (FEED, WIDTH)), ("up_proj", (FEED, WIDTH)), ("down_proj", (WIDTH, FEED))):
        yield f"{layer}.mlp.{name}.weight", shape


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """The released VAE's tensors by the names of its first files, which this library reads."""
    import torch

    from qwen_image_fast import AutoencoderKLQwenImage

    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoencoderKLQwenImage().state_dict().items()}
    return {wan_name(name): shape for name, shape in shapes.items()}


def wan_name(name: str) -> str:
    """What the first files call a tensor of the VAE."""
    name = re.sub(r"^encoder\.down_blocks\.", "encoder.downsamples.", name)
    name = re.sub(r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)", _upsample, name)
    name = re.sub(r"^decoder\.up_blocks\.(\d)\.upsamplers\.(0)", lambda m: _upsample(m, 3), name)
    for theirs, ours in _VAE_STARTS.items():
        if name.startswith(ours + "."):
            name = theirs + name.removeprefix(ours)
            break
    if "resnets" in name or "samples" in name or "middle" in name:
        for theirs, ours in _VAE_ENDS.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _upsample(match: re.Match[str], layer: int = 0) -> str:
    """The decoder's layers are numbered in one row: three and what resamples, in every block."""
    return f"decoder.upsamples.{4 * int(match[1]) + int(match[2]) + layer}"


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in float16 that takes no room on a disk that knows sparse files."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * _numbers(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _numbers(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def main() -> None:
    from stable_diffusion_cpp import StableDiffusion

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints where it likes
    transformer, text, vae = (str(given.folder / name) for name in NAMES)
    model = StableDiffusion(
        diffusion_model_path=transformer, llm_path=text, vae_path=vae, vae_decode_only=True, n_threads=given.threads,
        verbose=given.verbose,
    )  # fmt: skip
    before = [time.process_time(), time.perf_counter()]

    def on_step(step: int, steps: int, seconds: float) -> None:
        now = time.process_time(), time.perf_counter()
        print(json.dumps([step, now[0] - before[0], now[1] - before[1], seconds]), file=answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks any more
        before[:] = time.process_time(), time.perf_counter()

    model.generate_image(
        PROMPT, width=given.size, height=given.size, cfg_scale=1.0, sample_steps=1000, sample_method="euler", seed=0,
        progress_callback=on_step,
    )  # fmt: skip


if __name__ == "__main__":
    main()

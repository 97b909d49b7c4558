"""Flow matching of the transformer, jointly with a small text encoder or with a frozen one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_image_fast.checkpoint import find_weights, save_state
from qwen_image_fast.models.text_encoder import T2I_DROP, T2I_TEMPLATE
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.pipelines.conditions import encode_edit_prompts
from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
from qwen_image_fast.tiny import write_untrained
from qwen_image_fast.training.lora import add_lora, save_lora
from qwen_image_fast.training.memory import step_flops
from qwen_image_fast.training.objectives.flow import FlowSample, flow_losses
from qwen_image_fast.training.optimizer import freeze_dead
from qwen_image_fast.training.recipe import DataRecipe, FlowRecipe
from qwen_image_fast.training.run_log import grid
from qwen_image_fast.training.tiny.batches import VALIDATION_SIGMAS, FlowBatches, RawSample
from qwen_image_fast.training.tiny.latents import LatentCache, encode_images
from qwen_image_fast.training.tiny.sources import Source, make_source
from qwen_image_fast.training.trainer import Losses


def encode_captions(
    text_encoder: Any, tokenizer: Any, captions: Sequence[str], template: str, drop: int, limit: int
) -> list[Tensor]:
    """`encode_prompts` in one batch for captions of unequal length: row i is [tokens of caption i, hidden].

    Short rows are filled up behind their end. Attention is causal, so what is kept never sees the filling, and no
    attention mask is needed.
    """
    ids = [row[: drop + limit] for row in tokenizer([template.format(c) for c in captions])["input_ids"]]
    longest = max(len(row) for row in ids)
    device = text_encoder.get_input_embeddings().weight.device
    filled = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    hidden = text_encoder(input_ids=filled, use_cache=False).last_hidden_state
    return [states[drop : len(row)] for states, row in zip(hidden, ids)]


class FlowTask:
    """A `Task`: see `trainer.py`.

    Args:
        recipe: of the run. folder: of the run; without `recipe.model.folder` the tiny model is made in `start/` there.
        source: instead of the one that the recipe names.
    """

    def __init__(self, recipe: FlowRecipe, folder: Path, source: Source | None = None):
        self.recipe = recipe
        self.device = pick_device(recipe.device)
        self.folder = Path(recipe.model.folder or folder / "start")
        if not recipe.model.folder and not (self.folder / "model_index.json").is_file():
            write_untrained(self.folder, seed=recipe.seed, edit=True)
        parts: dict[str, Any] = {}
        if recipe.model.vae:
            parts["vae"] = AutoencoderKLQwenImage.from_pretrained(recipe.model.vae, device=self.device)
        self.edits = any(recipe.data.tasks.get(task) for task in ("ti2i", "recon"))
        kind: Any = QwenImageEditPlusPipeline if self.edits else QwenImagePipeline
        pipe = kind.from_pretrained(self.folder, torch_dtype=torch.float32, device=self.device, **parts)
        shared = {name: getattr(pipe, name) for name in QwenImagePipeline.parts}
        self.pipe, self.edit_pipe = QwenImagePipeline(**shared), pipe if self.edits else None
        self.dtype = pick_dtype(recipe.model.dtype, self.device)
        self.transformer: Any = self.pipe.transformer.to(self.dtype).train()
        # torch's backward of 16-bit attention is slow on the CPU, and a text encoder that learns is a small one.
        on_cpu = recipe.model.train_text_encoder and self.device.type == "cpu"
        self.text_encoder: Any = self.pipe.text_encoder.to(torch.float32 if on_cpu else self.dtype)
        for frozen in (self.pipe.vae, self.text_encoder, self.transformer):
            frozen.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if recipe.lora.rank:
            add_lora(self.transformer, recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets, seed=recipe.seed)
        else:
            self.transformer.requires_grad_(True)
            freeze_dead(self.transformer)
        if recipe.model.train_text_encoder:
            self.text_encoder.requires_grad_(True)
            self.modules["text_encoder"] = self.text_encoder
        if recipe.model.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if recipe.model.compile:
            self.transformer.forward_packed = torch.compile(self.transformer.forward_packed)
        cache = LatentCache(recipe.data.cache) if recipe.data.cache else None
        if source is None and not (cache and recipe.data.source == DataRecipe.source):
            source = make_source(recipe.data)
        self.maker = FlowBatches(recipe, source, self.transformer.config.in_channels, cache)

    def loss(self, batch: list[RawSample]) -> Losses:
        texts = self.texts(batch)
        losses = flow_losses(self.transformer, self.to_latents(batch), texts)
        images = [sum(f * h * w for f, h, w in raw.shapes) for raw in batch]
        flops = step_flops(self.transformer.config, images, [len(text) for text in texts])
        return Losses(losses.mean(), losses, sum(images), {}, flops)

    def to_latents(self, batch: list[RawSample]) -> list[FlowSample]:
        images = [image for raw in batch for image in raw.images]
        if images[0].dtype == np.uint8:
            latents = iter(encode_images(self.pipe.vae, images))
        else:
            latents = iter([torch.from_numpy(image).to(self.device) for image in images])
        samples = []
        for raw in batch:
            target, *references = [next(latents) for _ in raw.images]
            noise = raw.noise.to(self.device)
            samples.append(FlowSample(target, raw.shapes[0], noise, raw.sigma, references, raw.shapes[1:]))
        return samples

    def texts(self, batch: list[RawSample]) -> list[Tensor]:
        """Condition states of each sample, as the pipelines make them: with references, of what Qwen2.5-VL sees too."""
        out: dict[int, Tensor] = {}
        plain = [i for i, raw in enumerate(batch) if len(raw.images) == 1]
        edits = [i for i, raw in enumerate(batch) if len(raw.images) > 1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.recipe.model.train_text_encoder):
            if plain:
                captions, limit = [batch[i].caption for i in plain], self.recipe.model.max_text_tokens
                states = encode_captions(
                    self.text_encoder, self.pipe.tokenizer, captions, T2I_TEMPLATE, T2I_DROP, limit
                )
                out.update(zip(plain, states))
            if edits:
                assert self.edit_pipe is not None
                states = encode_edit_prompts(
                    self.text_encoder, self.pipe.tokenizer, self.edit_pipe.processor,
                    [batch[i].caption for i in edits], [batch[i].pictures for i in edits], one_batch=True,
                )  # fmt: skip
                out.update(zip(edits, states))
        return [out[i] for i in range(len(batch))]

    def describe(self, batch: list[RawSample], index: int) -> str:
        raw = batch[index]
        return f"sample {raw.index} ({raw.task}, caption {raw.caption!r}, sigma {raw.sigma:.4f})"

    def validate(self) -> dict[str, float]:
        """Mean loss of the validation samples at each noise level, and over all."""
        raw, losses = self.maker.validation(), []
        for start in range(0, len(raw), self.recipe.batch):
            part = raw[start : start + self.recipe.batch]
            losses.append(flow_losses(self.transformer, self.to_latents(part), self.texts(part)))
        by_level = torch.cat(losses).view(len(VALIDATION_SIGMAS), -1).mean(1).tolist()
        named = {f"validation_loss_{level}": loss for level, loss in zip(VALIDATION_SIGMAS, by_level)}
        return {"validation_loss": sum(by_level) / len(by_level), **named, **self._text_accuracy()}

    def _text_accuracy(self) -> dict[str, float]:
        """How much of held-out texts can be read in the pictures drawn for them, and in edits that change a text."""
        count = self.recipe.log.ocr_samples
        if not count:
            return {}
        # Only here, because a run without it needs no OCR.
        from qwen_image_fast.training.evaluation import evaluate_edit, evaluate_text
        from qwen_image_fast.training.evaluation.cases import held_out_cases, held_out_edits
        from qwen_image_fast.training.evaluation.ocr import Reader
        from qwen_image_fast.training.evaluation.text_metrics import summarise

        synthesis, reader = make_source(self.recipe.data).recipe, Reader()
        draw = evaluate_text.drawn_by(self.pipe, **self._sampling())
        results = evaluate_text.evaluate(draw, held_out_cases(synthesis, count), synthesis, reader)
        found = summarise([result.score for result in results])
        values = {"ocr_exact": found.exact, "ocr_word_accuracy": found.word_accuracy, "ocr_ned": found.ned}
        if self.edit_pipe is not None:
            edit = evaluate_edit.edited_by(self.edit_pipe, **self._sampling())
            edits = list(evaluate_edit.evaluate_edits(edit, held_out_edits(synthesis, count // 2, "text"), reader))
            totals = evaluate_edit.summary(edits)["text"]
            values |= {"edit_exact": totals["exact"], "edit_psnr_outside": totals["psnr_outside"]}
        return values

    def _sampling(self) -> dict[str, Any]:
        height, width = self.recipe.data.buckets[0]
        steps = self.recipe.log.sample_steps
        return {"height": height, "width": width, "num_inference_steps": steps, "true_cfg_scale": 1.0}

    def sample_grid(self) -> np.ndarray | None:
        """Pictures of the recipe's prompts; below them references and what was made of them."""
        prompts, seed = self.recipe.log.prompts, self.recipe.seed
        if not prompts:
            return None
        made = self.pipe(prompts, seed=seed, output_type="np", progress=False, **self._sampling())
        rows = [(image * 255).round().astype(np.uint8) for image in made.images]
        if self.edit_pipe is not None and hasattr(self.maker.source, "edit"):
            pairs = [self.maker.source.edit(self.maker.validation_seed, i) for i in range(len(prompts))]
            edited = self.edit_pipe(
                [list(pair.references) for pair in pairs], [pair.caption for pair in pairs], seed=seed,
                output_type="np", progress=False, **self._sampling(),
            )  # fmt: skip
            rows += [pair.references[0] for pair in pairs]
            rows += [(image * 255).round().astype(np.uint8) for image in edited.images]
        return grid(rows, columns=len(prompts))

    def export(self, folder: Path) -> None:
        """The pipeline's folder with the trained parts, or the LoRA files alone."""
        if self.recipe.lora.rank:
            save_lora(self.transformer, folder, self.recipe.lora)
            return
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        self.transformer.save_pretrained(folder / "transformer")
        self.pipe.vae.save_pretrained(folder / "vae")
        if self.recipe.model.train_text_encoder:
            save_text_encoder(self.text_encoder, self.folder / "text_encoder", folder / "text_encoder")


def save_text_encoder(model: Any, original: Path, folder: Path) -> None:
    """Write the language model's weights in the released key layout; the rest (vision tower, head) from `original`."""
    from safetensors.torch import load_file

    state = {name: t for path in find_weights(original, base_name="model") for name, t in load_file(path).items()}
    trained = {n.replace("language_model.", "model.", 1): t for n, t in model.state_dict().items()}
    if unknown := trained.keys() - state.keys():
        raise ValueError(f"save_text_encoder: {original} must have the released key layout, it lacks {min(unknown)}")
    save_state(state | trained, folder, base_name="model")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU, where most machines emulate bfloat16 slowly."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]

"""Flow matching of the transformer, jointly with a small text encoder or with a frozen one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qwen_image_fast.checkpoint import find_weights, save_state
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.model_defaults import GENERATION_FILE
from qwen_image_fast.models.stored_modulation import refuse_training
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.parallel.ulysses import split_layout
from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
from qwen_image_fast.tiny import write_untrained
from qwen_image_fast.training.adapters import draw_kept, without_adapters
from qwen_image_fast.training.batches.batches import VALIDATION_SIGMAS, FlowBatches, RawSample, StagedBatches
from qwen_image_fast.training.batches.latents import LatentCache
from qwen_image_fast.training.lora import LORAS, add_lora, save_lora, save_lora_file
from qwen_image_fast.training.parallel.export import export_model, full_state
from qwen_image_fast.training.parallel.layout import Parallel
from qwen_image_fast.training.producer.backend import BatchMaker
from qwen_image_fast.training.producer.encode import Encoders, EncodingMaker
from qwen_image_fast.training.producer.encoded import EncodedStore, models_of
from qwen_image_fast.training.recipe.curriculum import Curriculum, one_stage
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.names import model_folder, vae_folder
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.sources.sample import Source
from qwen_image_fast.training.sources.survey import sources_of
from qwen_image_fast.training.tasks.device import pick_device, pick_dtype
from qwen_image_fast.training.tasks.flops import step_flops
from qwen_image_fast.training.tasks.flow_samples import samples, sampling
from qwen_image_fast.training.tasks.task import Drawn, Losses
from qwen_image_fast.training.trainable import choose_trainable
from qwen_image_fast.training.velocity import FlowSample, forward, interpolated, packed, velocities
from qwen_image_fast.weights.formats import open_weights


def flow_losses(
    transformer: Any, samples: Sequence[FlowSample], texts: Sequence[Tensor], parallel: Parallel | None = None
) -> Tensor:
    """mean over a sample's target values of (v(x_sigma, sigma, text, references) - (eps - x0))^2, for each sample.

    x_sigma = (1 - sigma) x0 + sigma eps (Liu et al., arXiv 2209.03003; in the sign of the released model). References
    follow the target in the image stream without noise and without loss. The loss of a batch is the mean of the result:
    a large image counts as much as a small one, and a sample as much as alone in its batch. With weights w of its
    tokens the loss of a sample is sum w error^2 / sum w. A sample's own velocity stands in the place of eps - x0.

    Args:
        transformer: a `QwenImageTransformer2DModel`. samples: on its device, in any floating-point type.
        texts: condition encoder states of each sample, [tokens, joint_attention_dim].
        parallel: with cp > 1 this rank computes its rows, and the results of the cp ranks add up to the losses.

    Returns:
        float32 [samples]. The interpolation and the loss are computed in float32.
    """
    lengths = [len(s.target) for s in samples]
    sigma = torch.tensor([s.sigma for s in samples], dtype=torch.float32, device=transformer.proj_out.weight.device)
    x0 = torch.cat([s.target for s in samples]).float()
    eps = torch.cat([s.noise for s in samples]).float()
    rows = sigma.repeat_interleave(torch.tensor(lengths, device=sigma.device), output_size=len(x0))[:, None]
    noisy = (1 - rows) * x0 + rows * eps
    given = packed(transformer, samples, noisy.split(lengths), texts)
    if parallel is not None and parallel.sizes.cp > 1:
        layout, img_rows, txt_rows = split_layout(given.layout, parallel.cp_rank, parallel.sizes.cp, parallel.cp_group)
        modulation, txt = transformer.sample_modulation(sigma), transformer.embed_text(given.states[txt_rows])
        out = transformer.forward_packed(given.img[img_rows], txt, layout, modulation)
        return _own_losses(out, eps - x0, given.kept, samples, img_rows)
    wanted = eps - x0
    if any(s.velocity is not None for s in samples):
        parts = zip(samples, wanted.split(lengths))
        wanted = torch.cat([part if s.velocity is None else s.velocity.to(part) for s, part in parts])
    errors = (forward(transformer, given).float() - wanted).square()
    if any(s.weights is not None for s in samples):
        errors = errors * _scaled_weights(samples, errors.device)[:, None]
    if len(set(lengths)) == 1:
        return errors.view(len(samples), -1).mean(1)
    return torch.stack([e.mean() for e in errors.split(lengths)])


def _scaled_weights(samples: Sequence[FlowSample], device: torch.device) -> Tensor:
    """float32, of all tokens one after another: w / mean w of each sample, 1 where it has none."""
    scaled = [
        torch.ones(len(s.target), device=device) if s.weights is None else s.weights.to(device) / s.weights.mean()
        for s in samples
    ]
    return torch.cat(scaled)


def _own_losses(out: Tensor, velocity: Tensor, kept: Tensor, samples: Sequence[FlowSample], rows: slice) -> Tensor:
    """The part of each sample's loss from the image rows `rows`, which `out` has. kept: the rows of `velocity`."""
    lengths = [len(s.target) for s in samples]
    own = (kept >= rows.start) & (kept < rows.stop)
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[own].to(out.device)
    own = own.to(out.device)
    errors = (out[kept.to(out.device)[own] - rows.start].float() - velocity[own]).square().mean(1)
    errors = errors * _scaled_weights(samples, out.device)[own]
    counts = torch.tensor(lengths, dtype=torch.float32, device=out.device)
    return errors.new_zeros(len(lengths)).index_add(0, sample, errors) / counts


class FlowTask:
    """A `Task`: see `trainer.py`.

    Args:
        recipe: of the run. folder: of the run; without `recipe.model.start` the tiny model is made in `start/` there.
        source: instead of those that the recipe names. sources: those, by `part_key`; None: made here.
        run: where there are several stages; `recipe` is then the first one's.
        memory_limit: bytes of the weights that are always there; None: `recipe.model.memory`, if that is said.
    """

    def __init__(
        self,
        recipe: FlowRecipe,
        folder: Path,
        source: Source | None = None,
        run: Curriculum | None = None,
        parallel: Parallel | None = None,
        sources: dict[str, Source] | None = None,
        memory_limit: int | None = None,
    ):
        self.recipe, self.run, self.parallel = recipe, run or one_stage(recipe), parallel
        self.rejected: list[tuple[None, str, str]] = []
        if sources is None:
            sources = sources_of(self.run) if source is None else {}
        self.device = parallel.device if parallel else pick_device(recipe.device)
        self.folder = model_folder(recipe.model.start) if recipe.model.start else folder / "start"
        if recipe.model.start:
            start = open_weights(find_weights(self.folder / "transformer"), "transformer")
            refuse_training(start.weights, f"model.start={recipe.model.start}")
        self.vae_folder = vae_folder(recipe.model.vae) if recipe.model.vae else self.folder / "vae"
        self.store: EncodedStore | None = None
        if recipe.data.encoded:
            self.store = EncodedStore(Path(recipe.data.encoded).expanduser(), models_of(self.folder, self.vae_folder))
        main = parallel is None or parallel.main
        if main and not recipe.model.start and not (self.folder / "model_index.json").is_file():
            write_untrained(self.folder, seed=recipe.seed, edit=True)
            shutil.copyfile(SHIPPED / GENERATION_FILE, self.folder / GENERATION_FILE)  # of its shape, so of its size
        self.dtype = pick_dtype(recipe.model.dtype, self.device)
        parts: dict[str, Any] = {}
        if parallel is not None:
            # For several processes torch must be newer than for one.
            from qwen_image_fast.training.parallel.shard import load_transformer, shard_root

            parallel.barrier()
            weights = self.folder / "transformer"
            parts["transformer"], self.bytes_read = load_transformer(weights, recipe, parallel, self.dtype)
        parts["vae"] = AutoencoderKLQwenImage.from_pretrained(
            self.vae_folder, torch_dtype=torch.float32, device=self.device
        )
        parts_of_data = [part for stage in self.run.stages for part in stage.recipe.data.parts]
        self.edits = any(part.tasks.get(task) for part in parts_of_data for task in ("ti2i", "recon"))
        kind: Any = QwenImageEditPlusPipeline if self.edits else QwenImagePipeline
        # In the type in which it computes: float32 weights of a large model would need twice the memory for a moment.
        loaded = torch.float32 if recipe.model.train_text_encoder else self.dtype
        if recipe.model.precision:
            parts |= {"precision": recipe.model.precision, "memory_limit": memory_limit or recipe.model.memory or None}
        pipe = kind.from_pretrained(self.folder, torch_dtype=loaded, device=self.device, **parts)
        shared = {name: getattr(pipe, name) for name in QwenImagePipeline.parts}
        self.pipe, self.edit_pipe = QwenImagePipeline(**shared), pipe if self.edits else None
        self.transformer: Any = self.pipe.transformer.train()
        if parallel is None and not recipe.model.precision:
            self.transformer.to(self.dtype)
        # torch's backward of 16-bit attention is slow on the CPU, and a text encoder that learns is a small one.
        on_cpu = recipe.model.train_text_encoder and self.device.type == "cpu"
        self.text_encoder: Any = self.pipe.text_encoder
        if not recipe.model.precision:
            self.text_encoder.to(torch.float32 if on_cpu else self.dtype)
        for frozen in (self.pipe.vae, self.text_encoder):
            frozen.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if recipe.lora.rank and parallel is None:
            add_lora(self.transformer, recipe.lora, recipe.seed)
        choose_trainable(self.transformer, adapters=recipe.lora.rank > 0)
        if recipe.model.train_text_encoder:
            self.text_encoder.requires_grad_(True)
            if parallel is not None:
                shard_root(self.text_encoder.float(), parallel, torch.float32)
            self.modules["text_encoder"] = self.text_encoder
        if recipe.model.compile:
            self.transformer.forward_packed = torch.compile(self.transformer.forward_packed)
        self.encoders = Encoders(
            self.pipe.vae,
            self.text_encoder,
            self.pipe.tokenizer,
            getattr(self.edit_pipe, "processor", None),
            self.store,
        )
        channels, share = self.transformer.config.in_channels, parallel.share if parallel else (0, 1)
        if len(self.run.stages) == 1:
            cache = LatentCache(recipe.data.cache) if recipe.data.cache else None
            self.makers = [FlowBatches(recipe, source, channels, cache, sources=sources, share=share)]
            self.maker: BatchMaker = self.makers[0]
        else:
            common: dict[str, Any] = {"run": self.run, "sources": sources, "share": share}
            self.makers = [
                FlowBatches(cast(FlowRecipe, stage.recipe), source, channels, number=k, **common)
                for k, stage in enumerate(self.run.stages)
            ]
            self.maker = StagedBatches(self.run, self.makers)
        if recipe.producers.encode and recipe.producers.backend != "here":
            self.maker = self.encoding(self.maker)
        self.enter(0)

    def enter(self, number: int) -> None:
        """Go on with a stage: its recipe from now on."""
        self.recipe, self.batches = cast(FlowRecipe, self.run.stages[number].recipe), self.makers[number]
        if self.recipe.model.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()

    def encoding(self, maker: BatchMaker) -> BatchMaker:
        """A maker whose batches come with latents and, where the condition encoder is frozen, with its states."""
        recipe = self.recipe
        device = self.device if recipe.producers.device == "auto" else torch.device(recipe.producers.device)
        return EncodingMaker(
            maker, self.folder, self.vae_folder, str(device), None if recipe.model.train_text_encoder else self.dtype,
            [cast(FlowRecipe, stage.recipe).model.max_text_tokens for stage in self.run.stages], self.run, self.edits,
            self.store,
        )  # fmt: skip

    def loss(self, batch: list[RawSample]) -> Losses:
        texts = self.texts(batch)
        if dropout := self.recipe.lora.dropout:
            # The same on every rank, whose samples of a micro-batch are others.
            draw_kept(self.transformer, dropout, self.recipe.seed, batch[0].index // self.recipe.batch)
        samples = self.kept(batch, self.to_latents(batch), texts)
        losses = flow_losses(self.transformer, samples, texts, self.parallel)
        images = [sum(f * h * w for f, h, w in raw.shapes) for raw in batch]
        lengths, adapters = [len(text) for text in texts], self.recipe.lora.rank > 0
        flops = step_flops(self.transformer.config, images, lengths, adapters=adapters)
        weights = torch.tensor([raw.weight for raw in batch], device=losses.device)
        levels = [raw.sigma for raw in batch]
        return Losses((losses * weights).mean(), losses, sum(images), {}, flops, levels)

    def kept(self, batch: list[RawSample], samples: list[FlowSample], texts: list[Tensor]) -> list[FlowSample]:
        """The samples; those that the model without adapters teaches, with its velocities."""
        places = [place for place, raw in enumerate(batch) if raw.keep]
        if places:
            chosen = [samples[place] for place in places]
            with without_adapters(self.transformer):
                own = velocities(self.transformer, chosen, interpolated(chosen), [texts[place] for place in places])
            for place, velocity in zip(places, own):
                samples[place] = replace(samples[place], velocity=velocity)
        return samples

    def to_latents(self, batch: list[RawSample]) -> list[FlowSample]:
        latents = iter(self.encoders.latents(batch))
        samples = []
        for raw in batch:
            target, *references = [next(latents).to(self.device) for _ in raw.images]
            noise = raw.noise.to(self.device)
            counts = None if raw.token_weights is None else torch.from_numpy(raw.token_weights)
            samples.append(FlowSample(target, raw.shapes[0], noise, raw.sigma, references, raw.shapes[1:], counts))
        return samples

    def texts(self, batch: list[RawSample]) -> list[Tensor]:
        """Condition states of each sample, made here unless a producer has."""
        if all(raw.states is not None for raw in batch):
            return [cast(Tensor, raw.states).to(self.device) for raw in batch]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.recipe.model.train_text_encoder):
            return self.encoders.texts(batch, self.recipe.model.max_text_tokens)

    def describe(self, batch: list[RawSample], index: int) -> str:
        raw = batch[index]
        return f"sample {raw.index} ({raw.task}, caption {raw.caption!r}, sigma {raw.sigma:.4f})"

    def validate(self) -> dict[str, float]:
        """Mean loss of the validation samples at each noise level, and over all."""
        raw, losses = self.batches.validation(), []
        if not raw:
            return self._text_accuracy()
        first = raw[: self.recipe.log.validation_samples]  # the others are the same at other noise levels
        self.rejected += [(None, *why) for sample in first for why in sample.rejected]
        for start in range(0, len(raw), self.recipe.batch):
            part = raw[start : start + self.recipe.batch]
            losses.append(self._validation_losses(part))
        by_level = torch.cat(losses).view(len(VALIDATION_SIGMAS), -1).mean(1).tolist()
        named = {f"validation_loss_{level}": loss for level, loss in zip(VALIDATION_SIGMAS, by_level)}
        return {"validation_loss": sum(by_level) / len(by_level), **named, **self._text_accuracy()}

    def _validation_losses(self, samples: list[RawSample]) -> Tensor:
        """Of all samples; ranks share them. A rank left without one computes the first, as the others wait for it."""
        part, parts = self.batches.share
        own = samples[part::parts] or samples[:1]
        losses = flow_losses(self.transformer, self.to_latents(own), self.texts(own), self.parallel)
        if self.parallel is None:
            return losses
        found = losses.new_zeros(len(samples))
        found[part::parts] = losses[: len(samples[part::parts])]
        return self.parallel.sum(found)

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

        synthesis, reader = make_source(self.recipe.data.parts[0]).recipe, Reader()
        draw = evaluate_text.drawn_by(self.pipe, **self._sampling())
        results = evaluate_text.evaluate(draw, held_out_cases(synthesis, count), synthesis, reader)
        found = summarise([result.score for result in results])
        values = {"ocr_exact": found.exact, "ocr_word_accuracy": found.word_accuracy, "ocr_ned": found.ned}
        if self.edit_pipe is not None:
            edit = evaluate_edit.edited_by(self.edit_pipe, **self._sampling())
            edits = list(evaluate_edit.evaluate_edits(edit, held_out_edits(synthesis, count // 2, "text"), reader))
            totals = evaluate_edit.summary(edits)["text"]
            values |= {"edit_text_exact": totals["text_exact"], "edit_psnr_outside": totals["psnr_outside"]}
        return values

    def _sampling(self) -> dict[str, Any]:
        return sampling(self.recipe, self.folder)

    def samples(self) -> list[Drawn]:
        drawn, rejected = samples(self.recipe, self.batches, self.pipe, self.edit_pipe, self._sampling())
        self.rejected += rejected
        return drawn

    def keep(self, folder: Path, step: int) -> Path | None:
        """The adapters so far as `loras/step-<step>.safetensors`, for `generate --lora` and others."""
        if not self.recipe.lora.rank:
            return None
        file = folder / LORAS / f"step-{step:08d}.safetensors"
        return save_lora_file(self.transformer, file, self.parallel, self.learned_from)

    @property
    def learned_from(self) -> set[str]:
        """The tasks of the run's data; none of runs after pre-training, whose data are prompts."""
        parts = [part for stage in self.run.stages for part in stage.recipe.data.parts]
        return {t for part in parts for t, weight in part.tasks.items() if weight and self.recipe.kind == "flow"}

    def export(self, folder: Path) -> None:
        """The pipeline's folder with the trained parts, or the LoRA files alone."""
        if self.recipe.lora.rank:
            save_lora(self.transformer, folder, self.recipe.lora, self.parallel, self.learned_from)
            return
        parallel, trained = self.parallel, self.text_encoder if self.recipe.model.train_text_encoder else None
        if parallel is not None:
            export_model(self.transformer, folder / "transformer", self.dtype, parallel)
        text_state = full_state(trained) if trained is not None else {}
        if parallel is not None and not parallel.main:
            return
        # The transformer of several ranks is there already, and may be large.
        skipped = shutil.ignore_patterns("transformer") if parallel is not None else None
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=skipped)
        if parallel is None:
            self.transformer.save_pretrained(folder / "transformer")
        self.pipe.vae.save_pretrained(folder / "vae")
        if trained is not None:
            save_text_encoder(text_state, self.folder / "text_encoder", folder / "text_encoder")


def save_text_encoder(trained_state: dict[str, Tensor], original: Path, folder: Path) -> None:
    """Write the language model's weights in the released key layout; the rest (vision tower, head) from `original`."""
    from safetensors.torch import load_file

    state = {name: t for path in find_weights(original, base_name="model") for name, t in load_file(path).items()}
    trained = {n.replace("language_model.", "model.", 1): t for n, t in trained_state.items()}
    if unknown := trained.keys() - state.keys():
        raise ValueError(f"save_text_encoder: {original} must have the released key layout, it lacks {min(unknown)}")
    save_state(state | trained, folder, base_name="model")

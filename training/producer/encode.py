"""What producers and the trainer do alike: pictures to latents, captions to condition states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen_image_fast.models.text_encoder import T2I_DROP, T2I_TEMPLATE
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.once import warn_once
from qwen_image_fast.pipelines.conditions import encode_edit_prompts
from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
from qwen_image_fast.training.batches.latents import encode_images
from qwen_image_fast.training.producer.encoded import EncodedStore

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from qwen_image_fast.training.batches.batches import Batch, RawSample
    from qwen_image_fast.training.producer.backend import BatchMaker
    from qwen_image_fast.training.recipe.curriculum import Curriculum


def encode_captions(
    text_encoder: Any, tokenizer: Any, captions: Sequence[str], template: str, drop: int, limit: int
) -> list[Tensor]:
    """`encode_prompts` in one batch for captions of unequal length: row i is [tokens of caption i, hidden].

    Short rows are filled up behind their end. Attention is causal, so what is kept never sees the filling, and no
    attention mask is needed.
    """
    whole = tokenizer([template.format(c) for c in captions])["input_ids"]
    for caption, row in zip(captions, whole):
        if len(row) > drop + limit:
            what = "the caption %.40r is cut: its last %d tokens are beyond model.max_text_tokens, %d"
            warn_once(logger, text_encoder, what, caption, len(row) - drop - limit, limit)
    ids = [row[: drop + limit] for row in whole]
    longest = max(len(row) for row in ids)
    device = text_encoder.get_input_embeddings().weight.device
    filled = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    hidden = text_encoder(input_ids=filled, use_cache=False).last_hidden_state
    return [states[drop : len(row)] for states, row in zip(hidden, ids)]


class Encoders:
    """The models that only look: VAE, condition encoder, its tokenizer, and its processor where there are edits.

    store: keeps what they make; the states only while the encoder does not learn.
    """

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, processor: Any, store: EncodedStore | None = None):
        self.vae, self.text_encoder, self.tokenizer, self.processor = vae, text_encoder, tokenizer, processor
        self.store = store

    def latents(self, batch: Sequence[RawSample]) -> list[Tensor]:
        """Packed latents of all images of a batch, one after another; those made before as they are."""
        images = [image for raw in batch for image in raw.images]
        if images[0].dtype != np.uint8:
            return [torch.from_numpy(image) for image in images]
        if self.store is None:
            return encode_images(self.vae, images)
        weight = next(self.vae.parameters())
        return self.store.through(
            "latents", weight, [(image,) for image in images],
            lambda places: encode_images(self.vae, [images[place] for place in places]),
        )  # fmt: skip

    def texts(self, batch: Sequence[RawSample], limit: int) -> list[Tensor]:
        """Condition states of each sample, as the pipelines make them: with references, of what Qwen2.5-VL sees too."""
        weight = self.text_encoder.get_input_embeddings().weight
        if self.store is None or any(p.requires_grad for p in self.text_encoder.parameters()):
            return self._texts(batch, limit)
        items = [(T2I_TEMPLATE, T2I_DROP, limit, raw.caption, len(raw.images), *raw.pictures) for raw in batch]
        return self.store.through(
            "states", weight, items, lambda places: self._texts([batch[place] for place in places], limit)
        )

    def _texts(self, batch: Sequence[RawSample], limit: int) -> list[Tensor]:
        out: dict[int, Tensor] = {}
        plain = [i for i, raw in enumerate(batch) if len(raw.images) == 1]
        edits = [i for i, raw in enumerate(batch) if len(raw.images) > 1]
        if plain:
            captions = [batch[i].caption for i in plain]
            states = encode_captions(self.text_encoder, self.tokenizer, captions, T2I_TEMPLATE, T2I_DROP, limit)
            out.update(zip(plain, states))
        if edits:
            self._say_long([batch[i].caption for i in edits], limit)
            states = encode_edit_prompts(
                self.text_encoder, self.tokenizer, self.processor,
                [batch[i].caption for i in edits], [batch[i].pictures for i in edits], one_batch=True,
            )  # fmt: skip
            out.update(zip(edits, states))
        return [out[i] for i in range(len(batch))]

    def _say_long(self, instructions: Sequence[str], limit: int) -> None:
        """Instructions of edits are whole, as the pipelines take them: plans of memory count on the limit."""
        for instruction, row in zip(instructions, self.tokenizer(list(instructions))["input_ids"]):
            if len(row) > limit:
                what = "the instruction %.40r has %d tokens, more than model.max_text_tokens, %d: an edit's is not cut"
                warn_once(logger, self.text_encoder, what, instruction, len(row), limit)


class EncodingMaker:
    """A `BatchMaker` whose batches are encoded; it loads the models where it is used.

    Args:
        maker: of the raw batches. folder: of the pipeline. vae: the VAE's. device: of the models.
        states: the type of the frozen condition encoder; None: it learns, and the trainer runs it.
        store: keeps what is encoded.
        limits: most text tokens in each stage of `run`. edits: whether samples may have references.
    """

    def __init__(
        self, maker: BatchMaker, folder: Path, vae: Path, device: str, states: torch.dtype | None, limits: list[int],
        run: Curriculum, edits: bool, store: EncodedStore | None = None,
    ):  # fmt: skip
        self.store = store
        self.maker, self.folder, self.vae, self.device = maker, folder, vae, device
        self.states, self.limits, self.run, self.edits = states, limits, run, edits
        self._encoders: Encoders | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoders": None}

    def use(self, changes: Any) -> None:
        self.maker.use(changes)

    @torch.no_grad()
    def batch(self, step: int, micro: int) -> Batch:
        made, encoders = self.maker.batch(step, micro), self._loaded()
        latents = iter(encoders.latents(made))
        for raw in made:
            raw.images = [next(latents).float().cpu().numpy() for _ in raw.images]
        if self.states is not None:
            for raw, states in zip(made, encoders.texts(made, self.limits[self.run.number(step)])):
                raw.states, raw.pictures = states.cpu(), []
        return made

    def _loaded(self) -> Encoders:
        if self._encoders is None:
            self._encoders = self._load()
        return self._encoders

    def _load(self) -> Encoders:
        vae = AutoencoderKLQwenImage.from_pretrained(self.vae, device=self.device)
        if self.states is None:
            return Encoders(vae, None, None, None, self.store)
        kind: Any = QwenImageEditPlusPipeline if self.edits else QwenImagePipeline
        pipe = kind.from_pretrained(
            self.folder, torch_dtype=torch.float32, device=self.device, vae=vae, transformer=None
        )
        encoder = pipe.text_encoder.to(self.states).requires_grad_(False)
        return Encoders(vae, encoder, pipe.tokenizer, getattr(pipe, "processor", None), self.store)

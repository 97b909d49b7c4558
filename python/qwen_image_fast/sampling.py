"""From noise to latents on packed batches: the step that pipelines and the server share, and the pipelines' loop."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from qwen_image_fast.graphs import StepGraphs
from qwen_image_fast.models.hooks import users_hook
from qwen_image_fast.models.modulation import Modulation, free_modulation_weights
from qwen_image_fast.models.packing import cumulative, pack
from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.once import warn_once
from qwen_image_fast.ops.guided_step import guided_step
from qwen_image_fast.schedulers import calculate_shift

logger = logging.getLogger(__name__)


@dataclass
class Text:
    """The condition of one sample: embeds [tokens, joint_attention_dim]; positions of the tokens, None: 0, 1, 2, ..."""

    embeds: Tensor
    positions: Tensor | None = None


@dataclass
class Sample:
    """One image to make.

    latents: [tokens, channels] packed noise. shape: (frames, height, width) in tokens. cond, uncond: its conditions;
    uncond None: no classifier-free guidance. references, reference_shapes: packed latents of 0..N images that stand
    behind it in the sequence, and their shapes. layers: images of that shape, one after another in `latents`.
    image: clean latents to start from; `latents` is then the noise to mix them with. mask: 1 where the image may
    change, like `latents`; 0 keeps `image`. mu: the shift of its schedule; None: from its number of tokens.
    """

    latents: Tensor
    shape: ImageShape
    cond: Text
    uncond: Text | None = None
    references: Sequence[Tensor] = ()
    reference_shapes: Sequence[ImageShape] = ()
    layers: int = 1
    image: Tensor | None = None
    mask: Tensor | None = None
    mu: float | None = None

    @property
    def shapes(self) -> tuple[ImageShape, ...]:
        """Of all its images in the sequence."""
        return (*[self.shape] * self.layers, *self.reference_shapes)

    def noised(self, sigma: Tensor) -> Tensor:
        """`image` at a noise level, a scalar in its dtype."""
        assert self.image is not None
        return sigma * self.latents + (1.0 - sigma) * self.image


# At a step, for these latents: the residuals of ControlNets for the transformer's blocks, each [rows, width].
Residuals = Callable[[int, Tensor], Sequence[Tensor]]


class Changed(NamedTuple):
    """What a callback puts in place of the latents and the prompts' embeddings of every sample; None: kept."""

    latents: Sequence[Tensor] | None = None
    prompt_embeds: Sequence[Tensor] | None = None


# Called after every step with its index, the timestep (1000 * sigma) and the latents of every sample.
StepCallback = Callable[[int, float, list[Tensor]], "Changed | None"]


def schedule_shift(scheduler, tokens: int) -> float:
    """mu of an image of `tokens` tokens, from the scheduler's configuration (diffusers' defaults where it has none)."""
    config = scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def noise_levels(scheduler, mu: float, steps: int, sigmas: Sequence[float] | None = None) -> Tensor:
    """The schedule shifted by `mu`, float32 [steps + 1] on the CPU."""
    if getattr(scheduler.config, "stochastic_sampling", False):
        raise ValueError("the scheduler must not use stochastic_sampling: this loop takes deterministic Euler steps")
    levels = np.linspace(1.0, 1 / steps, steps).tolist() if sigmas is None else list(sigmas)
    scheduler.set_timesteps(sigmas=levels, mu=mu)
    return scheduler.sigmas.cpu()


@dataclass
class Track:
    """A sample on its way from noise to latents.

    levels: its noise levels, float32 [steps + 1] on the CPU; dt: their differences on the device. table, row: where its
    modulation vectors begin; shift: mu. cond, uncond: its embedded texts [tokens, width]. step: the next one.
    latents: [tokens, channels] as they are before that.
    """

    sample: Sample
    levels: Tensor
    dt: Tensor
    table: Modulation
    row: int
    cond: Tensor
    uncond: Tensor | None
    guidance: float
    rescale: bool
    step: int
    latents: Tensor

    @property
    def done(self) -> bool:
        return self.step >= len(self.dt)

    @property
    def branches(self) -> int:
        return 1 if self.uncond is None else 2


Tables = Callable[[Sequence[float], "int | None"], Modulation]


def start(
    transformer,
    scheduler,
    samples: Sequence[Sample],
    *,
    steps: int,
    sigmas: Sequence[float] | None = None,
    begin: int = 0,
    guidance: float = 1.0,
    rescale: bool = True,
    tables: Tables | None = None,
) -> list[Track]:
    """The samples of a call before their first step, `begin`, each with the schedule of its own size.

    The modulation vectors of all steps are computed here, by one table of all schedules. `tables` gives it for noise
    levels and the flag of the Layered model; default: that of the transformer, which keeps recent ones.
    """
    device = samples[0].latents.device
    shifts = [schedule_shift(scheduler, len(s.latents)) if s.mu is None else s.mu for s in samples]
    levels = {mu: noise_levels(scheduler, mu, steps, sigmas) for mu in dict.fromkeys(shifts)}
    rows = {mu: k * (len(schedule) - 1) for k, (mu, schedule) in enumerate(levels.items())}
    noise = [float(sigma) for schedule in levels.values() for sigma in schedule[:-1]]
    noise = [*noise, 0.0] if transformer.config.zero_cond_t else noise
    if tables is None:
        tables = functools.partial(transformer.modulation_tables.get, transformer)
    # The Layered model's flag of RGB images; all of its images are RGBA.
    table = tables(noise, 0 if transformer.config.use_additional_t_cond else None)
    differences = {mu: schedule.diff().to(device) for mu, schedule in levels.items()}
    tracks = []
    for sample, mu, (cond, uncond) in zip(samples, shifts, embedded(transformer, samples)):
        sigma = levels[mu][begin].to(sample.latents)
        x = sample.latents if sample.image is None else sample.noised(sigma)
        tracks.append(
            Track(sample, levels[mu], differences[mu], table, rows[mu], cond, uncond, guidance, rescale, begin, x)
        )
    return tracks


def embedded(transformer, samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor | None]]:
    """The texts of each sample as the blocks read them."""
    texts = [s.cond for s in samples] + [s.uncond for s in samples if s.uncond is not None]
    rows = transformer.embed_text(torch.cat([t.embeds for t in texts]))
    found = rows.split([len(t.embeds) for t in texts])
    guided = iter(found[len(samples) :])
    return [(cond, None if s.uncond is None else next(guided)) for s, cond in zip(samples, found)]


class Wave:
    """Samples that take steps together, each its own next one: one packed forward of all branches, without padding.

    They may differ in size, schedule, step, guidance, references and masks. `tracks`: in the order of the batch, which
    is the given one but that guided samples come first.
    """

    def __init__(self, transformer, tracks: Sequence[Track]):
        self.transformer = transformer
        if users_hook(transformer):
            warn_once(
                logger, transformer,
                "hooks on the transformer itself do not run in a pipeline, which calls its packed forward: put them on "
                "its blocks, or on layers"
            )  # fmt: skip
        self.tracks = sorted(tracks, key=_combination)
        guided = [t for t in self.tracks if t.uncond is not None]
        self.lengths = [len(t.latents) for t in self.tracks]
        self.guided_rows = sum(sum(len(part) for part in _image_rows(t)) for t in guided)
        self._branches = [*self.tracks, *guided]
        config, device = transformer.config, self.tracks[0].latents.device
        texts = [t.sample.cond for t in self.tracks] + [t.sample.uncond for t in guided if t.sample.uncond is not None]
        self.layout = pack(
            tuple(t.sample.shapes for t in self._branches),
            [len(t.embeds) for t in texts],
            axes_dim=config.axes_dims_rope,
            layer3d=config.use_layer3d_rope,
            zero_cond_t=config.zero_cond_t,
            txt_positions=None if all(t.positions is None for t in texts) else [
                torch.arange(len(t.embeds)) if t.positions is None else t.positions.cpu() for t in texts
            ],
            targets=[t.sample.layers for t in self._branches],
            device=device,
        )  # fmt: skip
        # Samples of one guidance are one call of guided_step.
        self._groups = [list(group) for _, group in groupby(self.tracks, _combination)]
        self._offsets = [cumulative([len(t.latents) for t in group], device) for group in self._groups]
        self._first: list[int] = []
        self._taken = 0
        self._caches = getattr(transformer, "is_cache_enabled", False)
        if self._caches:
            transformer._reset_stateful_cache()  # what is cached is of other rows
        self.retext()

    def retext(self) -> None:
        """Read the embedded texts of the samples again."""
        guided = [t.uncond for t in self.tracks if t.uncond is not None]
        self.txt = torch.cat([*(t.cond for t in self.tracks), *guided])

    def step(self, graphs: StepGraphs | None = None, residuals: Sequence[Tensor] | None = None) -> None:
        """Take the next step of every sample. `graphs`: by these, where nothing is added; `residuals`: of ControlNets,
        added to the blocks of the image rows of one branch, where all samples are alike in guidance."""
        img = torch.cat([part for t in self.tracks for part in _image_rows(t)])
        inputs = torch.cat([img, img[: self.guided_rows]]), self.txt, self.layout, self._modulation()
        if graphs is not None:
            out = graphs.forward(self.transformer, *inputs)
        else:
            branches = len(self._branches) // len(self.tracks)
            added = None if residuals is None else [torch.cat([r] * branches) for r in residuals]
            with self.transformer.cache_context(str(id(self))) if self._caches else nullcontext():
                out = self.transformer.forward_packed(*inputs, added)
        out = out.to(img.dtype)  # autocast
        first, second = 0, sum(self.lengths)
        after: list[Tensor] = []  # put in place together: what fails changes no sample
        for group, offsets in zip(self._groups, self._offsets):
            x = torch.cat([t.latents for t in group])
            cond, uncond, first = out[first : first + len(x)], None, first + len(x)
            if group[0].uncond is not None:
                uncond, second = out[second : second + len(x)], second + len(x)
            same = all(t.dt is group[0].dt and t.step == group[0].step for t in group)
            steps = [t.dt[t.step : t.step + 1] for t in (group[:1] if same else group)]
            x = guided_step(
                x, cond, uncond, torch.cat(steps), group[0].guidance, group[0].rescale, None if same else offsets
            )  # fmt: skip
            parts = x.split([len(t.latents) for t in group])
            after += [
                latents if t.sample.mask is None else _kept(latents, t.sample, t.levels[t.step + 1])
                for t, latents in zip(group, parts)
            ]
        for t, latents in zip(self.tracks, after):
            t.latents, t.step = latents, t.step + 1
        self._taken += 1

    def _modulation(self) -> Modulation:
        """One condition for the whole batch where all samples share it, else one per segment of the layout."""
        first = self.tracks[0]
        zero_cond_t = self.transformer.config.zero_cond_t
        if all(t.table is first.table for t in self.tracks):
            if not zero_cond_t and all(t.row + t.step == first.row + first.step for t in self.tracks):
                return first.table.select(slice(first.row + first.step, first.row + first.step + 1))
            now = [t.row + t.step for t in self._branches]
            if now != [row + self._taken for row in self._first]:  # at first, and after steps in another wave
                self._first, self._taken, self._rows = now, 0, torch.tensor(now, device=first.latents.device)
            chosen = first.table.select(self._rows + self._taken)
            return chosen.with_references(first.table.select(slice(-1, None))) if zero_cond_t else chosen
        chosen = joined([t.table.select(slice(t.row + t.step, t.row + t.step + 1)) for t in self._branches])
        if not zero_cond_t:
            return chosen
        return chosen.with_references(joined([t.table.select(slice(-1, None)) for t in self._branches]))


def joined(parts: Sequence[Modulation]) -> Modulation:
    """The conditions of all, one after another."""
    img, txt, final = zip(*parts)
    return Modulation([torch.cat(t) for t in zip(*img)], [torch.cat(t) for t in zip(*txt)], torch.cat(final))


def check_same(ranks: Any, samples: Sequence[Sample], steps: int, guidance: float) -> None:
    """ValueError on every rank (parallel/ranks.py) where they are about to make different pictures."""
    texts = [text for s in samples for text in (s.cond, s.uncond)]
    ranks.check_same({
        "steps": steps, "guidance": guidance, "sizes": tuple(s.shapes for s in samples),
        "prompts": tuple(0 if text is None else len(text.embeds) for text in texts),
        "noise": torch.cat([s.latents for s in samples]),
    })  # fmt: skip


def _combination(track: Track) -> tuple[bool, float, bool]:
    """What samples must have in common to be one call of guided_step: unguided, or guided in the same way."""
    return (False, track.guidance, track.rescale) if track.uncond is not None else (True, 1.0, True)


def _image_rows(track: Track) -> tuple[Tensor, ...]:
    return (track.latents, *track.sample.references)


def _kept(latents: Tensor, sample: Sample, sigma: Tensor) -> Tensor:
    """(1 - mask) image_sigma + mask latents, at the noise level of the latents."""
    assert sample.mask is not None
    return (1 - sample.mask) * sample.noised(sigma.to(latents)) + sample.mask * latents


def denoise(
    transformer,
    scheduler,
    samples: Sequence[Sample],
    *,
    steps: int,
    sigmas: Sequence[float] | None = None,
    begin: int = 0,
    guidance: float = 1.0,
    rescale: bool = True,
    free_weights: bool = False,
    control: Callable[[Tensor], Residuals] | None = None,
    graphs: StepGraphs | None = None,
    on_step: StepCallback | None = None,
    before_step: Callable[[float], None] = lambda timestep: None,
    progress: bool = True,
    bar_options: Mapping[str, Any] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Latents of every sample after all steps, as one `Wave`.

    Modulation vectors of all steps are computed first; `free_weights` then releases the weights that made them.
    `begin`: the first step that is taken. `control`: given the noise levels of the samples, float32 [steps, samples],
    the residuals of ControlNets. With `graphs`, the transformer's passes are captured and replayed, where no ControlNet
    adds to them. `before_step`: told the timestep, 1000 * sigma. `bar_options`: of tqdm, beside `progress`.
    """
    tracks = start(
        transformer, scheduler, samples, steps=steps, sigmas=sigmas, begin=begin, guidance=guidance, rescale=rescale
    )
    if free_weights:
        free_modulation_weights(transformer, tracks[0].table)
    wave = Wave(transformer, tracks)
    levels = torch.stack([t.levels for t in tracks], 1)
    residuals = None if control is None else control(levels[:-1])
    total = len(levels) - 1
    shown: dict[str, Any] = {"total": total - begin, "desc": "denoise", "unit": "step"}
    shown |= {"disable": not progress, **(bar_options or {})}
    if residuals is not None:
        graphs = None
    if graphs is not None:
        graphs.start(transformer)
    with tqdm(**shown) as bar:
        for i in range(begin, total):
            if interrupted():
                break
            before_step(float(levels[i, 0]) * 1000)
            wave.step(graphs, None if residuals is None else residuals(i, torch.cat([t.latents for t in tracks])))
            if on_step is not None:
                changed = on_step(i - begin, float(levels[i, 0]) * 1000, [t.latents for t in tracks]) or Changed()
                if changed.latents is not None:
                    for t, latents in zip(tracks, changed.latents):
                        t.latents = latents.to(t.latents)
                if changed.prompt_embeds is not None:
                    for t, embeds in zip(tracks, changed.prompt_embeds):
                        t.sample.cond = Text(embeds.to(t.sample.cond.embeds), t.sample.cond.positions)
                    for t, texts in zip(tracks, embedded(transformer, samples)):
                        t.cond, t.uncond = texts
                    wave.retext()
                    residuals = None if control is None else control(levels[:-1])
            bar.update()
    return [t.latents for t in tracks]

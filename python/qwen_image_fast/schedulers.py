"""The sampler of Qwen-Image: flow matching with Euler steps on a schedule of noise levels sigma in [0, 1].

    x_sigma   = (1 - sigma) x_0 + sigma noise
    x_{i+1}   = x_i + (sigma_{i+1} - sigma_i) v                        v: the model's output, an estimate of noise - x_0
    timestep  = num_train_timesteps sigma

Schedules: `sigma = shift s / (1 + (shift - 1) s)` with a constant shift, or, with `use_dynamic_shifting`, a shift that
grows with the number of image tokens, `sigma = e^mu / (e^mu + 1/s - 1)` (https://arxiv.org/abs/2403.03206), optionally
stretched so that the last sigma before 0 is `shift_terminal`.

Every function keeps the order of operations and the precision of diffusers' scheduler of the same name, so that sigmas,
timesteps and samples have the same bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from qwen_image_fast.checkpoint import check_config, json_bytes, pretrained_folder, read_config
from qwen_image_fast.files import atomic_write
from qwen_image_fast.keywords import HUB, check_saving, refuse
from qwen_image_fast.models.base import Config, record_config
from qwen_image_fast.models.outputs import Output


def calculate_shift(
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 8192,
    base_shift: float = 0.5,
    max_shift: float = 0.9,
) -> float:
    """mu for an image of `image_seq_len` tokens: the line through (base_seq_len, base_shift), (max_seq_len, max_shift).

    The defaults are those of Qwen-Image's scheduler_config.json. Tokens of reference images do not count.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    intercept = base_shift - slope * base_seq_len
    return image_seq_len * slope + intercept


def lightning_config() -> dict[str, Any]:
    """Schedule of the 4- and 8-step weights of https://github.com/ModelTC/Qwen-Image-Lightning: shift 3, mu = ln 3."""
    size_independent = {"base_shift": math.log(3), "max_shift": math.log(3), "max_image_seq_len": 8192}
    return {"use_dynamic_shifting": True, "shift_terminal": None, **size_independent}


def named_schedule(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scheduler fields and call arguments of "lightning-4" and "lightning-8", which run without guidance."""
    known = {f"lightning-{steps}": steps for steps in (4, 8)}
    if name not in known:
        raise ValueError(f"named_schedule: name must be one of {', '.join(known)}, got {name!r}")
    return lightning_config(), {"num_inference_steps": known[name], "true_cfg_scale": 1.0}


@dataclass
class SchedulerOutput(Output):
    """The sample after one step."""

    prev_sample: torch.Tensor


class FlowMatchEulerDiscreteScheduler:
    """Euler steps on a flow-matching schedule; see the module's formulas and diffusers' scheduler of the same name.

    After `set_timesteps`: `sigmas`, float32 (steps + 1), from noise to 0 (to 1 with `invert_sigmas`), and `timesteps`,
    float32 (steps). `base_shift`, `max_shift` and the two sequence lengths are what a pipeline passes to
    `calculate_shift`. At most one of the karras, exponential and beta spacings replaces the shifted sigmas between
    their ends. `stochastic_sampling` draws new noise at every step.
    """

    config: Config
    config_name = "scheduler_config.json"
    order = 1

    @record_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        if bool(use_karras_sigmas) + bool(use_exponential_sigmas) + bool(use_beta_sigmas) > 1:
            raise ValueError("at most one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas may be set")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type must be 'exponential' or 'linear', got {time_shift_type!r}")
        ascending = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)
        sigmas = torch.from_numpy(ascending[::-1].copy()) / num_train_timesteps
        if not use_dynamic_shifting:
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.sigmas = sigmas
        self.timesteps = sigmas * num_train_timesteps
        self.sigma_max, self.sigma_min = sigmas[0].item(), sigmas[-1].item()
        self.num_inference_steps: int | None = None
        self.shift = shift
        self.step_index: int | None = None
        self.begin_index: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides) -> FlowMatchEulerDiscreteScheduler:
        """A scheduler from a stored configuration (also diffusers' `config`), some fields replaced by `overrides`."""
        return cls(**check_config({**config, **overrides}, cls))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, *, subfolder: str | None = None, **hub
    ) -> FlowMatchEulerDiscreteScheduler:
        """Read `scheduler_config.json`; `hub` takes revision, cache_dir, token and local_files_only."""
        refuse("from_pretrained", [name for name in hub if name not in HUB], ["subfolder", *HUB])
        folder = pretrained_folder(name_or_path, subfolder, [cls.config_name], **hub)
        return cls.from_config(read_config(folder, cls.config_name))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False) -> None:
        """Write `scheduler_config.json`, which diffusers reads too."""
        check_saving(True, push_to_hub)
        folder = Path(save_directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        content = json_bytes({"_class_name": type(self).__name__, **self.config})
        atomic_write(folder / self.config_name, lambda file: file.write(content))

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_shift(self, shift: float) -> None:
        """Replace the constant shift; takes effect at the next `set_timesteps`."""
        self.shift = shift

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of the schedule, whatever timestep the first `step` names (image-to-image)."""
        self.begin_index = begin_index

    def time_shift(self, mu: float, sigma: float, t):
        """`e^mu / (e^mu + (1/t - 1)^sigma)`, or with mu in place of e^mu where `time_shift_type` is linear."""
        factor = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return factor / (factor + (1 / t - 1) ** sigma)

    def stretch_shift_to_terminal(self, t):
        """Scale `1 - t` so that the last entry becomes `shift_terminal`; the first, at 1, stays.

        One step, from 1 to 0, has nothing to scale and stays too, where diffusers divides by zero.
        """
        distance = 1 - t
        if distance[-1] == 0:
            return t
        factor = distance[-1] / (1 - self.config.shift_terminal)
        return 1 - (distance / factor)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Make the schedule of a generation and forget the position in the previous one.

        `sigmas` are the values before shifting (pipelines pass linspace(1, 1/N, N)); by default they are spread between
        the ends of the training schedule. `timesteps` given with `sigmas` are used as they are; given alone they also
        define the sigmas before shifting. `mu` is needed with `use_dynamic_shifting`. ValueError on lengths that
        disagree and where a value is not a finite number, before or after shifting.
        """
        config = self.config
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("set_timesteps: mu must be given with use_dynamic_shifting, got None")
        if mu is not None and not math.isfinite(mu):
            raise ValueError(f"set_timesteps: mu must be finite, got {mu}")
        given = {"sigmas": sigmas, "timesteps": timesteps}
        arrays = {name: np.array(v).astype(np.float32) for name, v in given.items() if v is not None}
        for name, array in arrays.items():
            if array.ndim != 1 or not np.isfinite(array).all():
                raise ValueError(f"set_timesteps: {name} must be a list of finite numbers, got {given[name]}")
            if num_inference_steps is None:
                num_inference_steps = len(array)
            if len(array) != num_inference_steps:
                raise ValueError(f"set_timesteps: {name} must have {num_inference_steps} entries, got {len(array)}")
        if num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"set_timesteps: num_inference_steps must be at least 1, got {num_inference_steps}")

        levels = arrays.get("sigmas")
        if levels is None:
            ends = self.sigma_max * config.num_train_timesteps, self.sigma_min * config.num_train_timesteps
            levels = arrays.get("timesteps", np.linspace(*ends, num_inference_steps)) / config.num_train_timesteps
        with np.errstate(divide="ignore", invalid="ignore"):  # 1/0 becomes sigma 0; what is not finite is refused below
            if config.use_dynamic_shifting:
                levels = self.time_shift(cast(float, mu), 1.0, levels)
            else:
                levels = self.shift * levels / (1 + (self.shift - 1) * levels)
            if config.shift_terminal:
                levels = self.stretch_shift_to_terminal(levels)
        if not np.isfinite(levels).all():
            raise ValueError(f"set_timesteps: the shifted sigmas must be finite, got {levels.tolist()}")
        shifted = torch.from_numpy(self._respace(levels)).to(dtype=torch.float32, device=device)
        steps = shifted * config.num_train_timesteps
        if "timesteps" in arrays:
            steps = torch.from_numpy(arrays["timesteps"]).to(device=device)
        if config.invert_sigmas:
            shifted = 1.0 - shifted
            steps = shifted * config.num_train_timesteps
        self.num_inference_steps = num_inference_steps
        self.timesteps = steps
        self.sigmas = torch.cat([shifted, shifted.new_full((1,), float(config.invert_sigmas))])
        self.step_index = self.begin_index = None

    def _respace(self, levels: np.ndarray) -> np.ndarray:
        """Karras (https://arxiv.org/abs/2206.00364), exponential or beta (https://arxiv.org/abs/2407.12173) spacing."""
        first, last, count = levels[0].item(), levels[-1].item(), len(levels)
        if self.config.use_karras_sigmas:
            if min(first, last) < 0:
                raise ValueError(f"set_timesteps: karras spacing needs sigmas of at least 0, got {first} to {last}")
            low, high = last ** (1 / 7.0), first ** (1 / 7.0)
            return (high + np.linspace(0, 1, count) * (low - high)) ** 7.0
        if self.config.use_exponential_sigmas:
            return np.exp(np.linspace(math.log(first), math.log(last), count))
        if self.config.use_beta_sigmas:
            try:
                from scipy.stats import beta
            except ImportError as error:
                raise ImportError("set_timesteps: use_beta_sigmas needs scipy: pip install scipy") from error
            return last + beta.ppf(1 - np.linspace(0, 1, count), 0.6, 0.6) * (first - last)
        return levels

    def index_for_timestep(self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Where `timestep` is in the schedule; the second place where it occurs twice, so that no sigma is skipped."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        places = (schedule == float(timestep)).nonzero()
        if len(places) == 0:
            raise ValueError(f"index_for_timestep: timestep must be one of scheduler.timesteps, got {float(timestep)}")
        return int(places[1 if len(places) > 1 else 0])

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`sigma noise + (1 - sigma) sample` at `timestep` (B,), in the dtype of `sample` (B, ...).

        Without a begin index (training) each timestep is looked up in the schedule; with one (image-to-image) all
        samples are at the index of the next step.
        """
        if noise is None:
            raise ValueError("scale_noise: noise must be given, got None")
        sigmas = self.sigmas.to(device=sample.device, dtype=sample.dtype)
        if self.begin_index is None:
            indices = [self.index_for_timestep(t) for t in timestep]
        else:
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(timestep)
        sigma = sigmas[indices].reshape(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The next sample, computed in float32 and returned in the dtype of `model_output` (B, ...).

        `per_token_timesteps` (B, L) lets every token of a (B, L, D) sample be at its own noise level: each moves to the
        next lower sigma, `model_output` is then expected with its sign turned, as in diffusers, and the result stays
        float32. The four `s_*` arguments are there for diffusers' signature and have no effect there or here.
        """
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"step: timestep must be one of scheduler.timesteps, not an index, got {timestep}")
        if self.step_index is None:
            self.step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        if self.step_index + 1 >= len(self.sigmas):
            raise ValueError("step: the schedule is at its end; call set_timesteps before the next generation")
        sample = sample.to(torch.float32)
        if per_token_timesteps is None:
            sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
            dt = sigma_next - sigma
        else:
            token_sigmas = per_token_timesteps / self.config.num_train_timesteps
            schedule = self.sigmas[:, None, None]
            lower = ((schedule < token_sigmas[None] - 1e-6) * schedule).amax(dim=0)
            sigma, sigma_next = token_sigmas[..., None], lower[..., None]
            dt = sigma - sigma_next
        if self.config.stochastic_sampling:
            start = sample - sigma * model_output
            prev_sample = (1.0 - sigma_next) * start + sigma_next * _noise_like(sample, generator)
        else:
            prev_sample = sample + dt * model_output
        self.step_index += 1
        if per_token_timesteps is None:
            prev_sample = prev_sample.to(model_output.dtype)
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)


def _noise_like(sample: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> torch.Tensor:
    """Normal noise, drawn on the generator's device, so that a CPU generator gives one result on every machine."""
    if isinstance(generator, Sequence):
        return torch.cat([_noise_like(sample[i : i + 1], g) for i, g in enumerate(generator)])
    device = sample.device if generator is None else generator.device
    return torch.randn(sample.shape, generator=generator, device=device, dtype=sample.dtype).to(sample.device)

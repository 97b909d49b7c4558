"""The scheduler against diffusers, bit for bit, and against the published schedules of Qwen-Image."""

import json
import math
import sys

import diffusers
import numpy as np
import pytest
import torch

from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler, calculate_shift, lightning_config

QWEN_IMAGE = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
CONFIGS = {
    "default": {},
    "shift": {"shift": 3.0},
    "short": {"num_train_timesteps": 100, "shift": 0.7},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "inverted": {"invert_sigmas": True, "shift": 1.5},
    "qwen": QWEN_IMAGE,
    "lightning": lightning_config(),
    "linear": {**QWEN_IMAGE, "time_shift_type": "linear"},
    "no-terminal": {**QWEN_IMAGE, "shift_terminal": None},
    "karras": {**QWEN_IMAGE, "use_karras_sigmas": True},
    "exponential": {"shift": 3.0, "use_exponential_sigmas": True},
    "beta": {**QWEN_IMAGE, "use_beta_sigmas": True},
    "stochastic": {**QWEN_IMAGE, "stochastic_sampling": True},
    "inverted-dynamic": {**QWEN_IMAGE, "invert_sigmas": True},
}


def pair(config):
    return FlowMatchEulerDiscreteScheduler(**config), diffusers.FlowMatchEulerDiscreteScheduler(**config)


def assert_same_schedule(ours, theirs):
    for name in ("sigmas", "timesteps"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", CONFIGS)
def test_training_schedule_has_diffusers_bits(name):
    ours, theirs = pair(CONFIGS[name])
    assert_same_schedule(ours, theirs)
    assert (ours.sigma_min, ours.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
    assert (ours.shift, ours.order, len(ours)) == (theirs.shift, theirs.order, len(theirs))
    assert {k: v for k, v in theirs.config.items() if k[0] != "_"} == ours.config


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [2, 3, 8, 50])
@pytest.mark.parametrize("source", ["default", "linspace", "layered", "timesteps", "both", "rising"])
def test_schedule_has_diffusers_bits(name, steps, source):
    ours, theirs = pair(CONFIGS[name])
    linspace = np.linspace(1.0, 1 / steps, steps)
    arguments = {
        "default": {"num_inference_steps": steps},
        "linspace": {"sigmas": linspace},
        "layered": {"sigmas": np.linspace(1.0, 0, steps + 1)[:-1], "num_inference_steps": steps},
        "timesteps": {"timesteps": (linspace * 900).tolist()},
        "both": {"sigmas": linspace.tolist(), "timesteps": (linspace * 900).tolist()},
        "rising": {"sigmas": (0.9 * linspace[::-1]).tolist()},
    }[source]
    if (name, source) == ("karras", "rising"):
        with pytest.raises(ValueError, match="karras spacing needs sigmas of at least 0"):
            ours.set_timesteps(mu=0.7, **arguments)
        return
    for mu in (0.5387, calculate_shift(4096), 4.0):
        ours.set_timesteps(mu=mu, device="cpu", **arguments)
        theirs.set_timesteps(mu=mu, device="cpu", **arguments)
        assert_same_schedule(ours, theirs)
        assert ours.num_inference_steps == theirs.num_inference_steps


def test_set_shift_has_diffusers_bits():
    ours, theirs = pair({})
    for scheduler in (ours, theirs):
        scheduler.set_shift(2.5)
        scheduler.set_timesteps(7)
    assert ours.shift == 2.5
    assert_same_schedule(ours, theirs)


MU = {
    (512, 512): 0.538710,
    (640, 640): 0.567742,
    (1024, 1024): 0.693548,
    (1664, 928): 0.791129,
    (1472, 1104): 0.807056,
    (1584, 1056): 0.816432,
    (1328, 1328): 0.834325,
}


@pytest.mark.parametrize("size", MU)
def test_mu_of_published_sizes(size):
    assert calculate_shift((size[0] // 16) * (size[1] // 16)) == pytest.approx(MU[size], abs=1e-6)


def test_calculate_shift_is_diffusers():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift as theirs

    for length in (1, 256, 1024, 4096, 6889, 8192, 20000):
        assert calculate_shift(length) == theirs(length, 256, 8192, 0.5, 0.9)
        assert calculate_shift(length, 100, 4096, 0.1, 1.15) == theirs(length, 100, 4096, 0.1, 1.15)


GOLDEN = [  # width, height, steps, first sigmas, last sigmas
    (1024, 1024, 50, [1, 0.989701, 0.979192, 0.968465, 0.957516, 0.946335], [0.131149, 0.095498, 0.058476, 0.02, 0]),
    (1328, 1328, 50, [1, 0.990988, 0.981768, 0.972332, 0.962672], [0.145148, 0.105449, 0.063783, 0.02, 0]),
    (1664, 928, 40, [1, 0.988103, 0.975871, 0.963290, 0.950346], [0.168395, 0.121665, 0.072278, 0.02, 0]),
    (1024, 1024, 4, [1, 0.766709, 0.455614, 0.02, 0], []),
    (1024, 1024, 8, [1, 0.916024, 0.820046, 0.709295, 0.580075, 0.427347, 0.244054, 0.02, 0], []),
    (512, 512, 4, [1, 0.749268, 0.432588, 0.02, 0], []),
]


@pytest.mark.parametrize("width, height, steps, first, last", GOLDEN)
def test_published_schedules(width, height, steps, first, last):
    scheduler = FlowMatchEulerDiscreteScheduler(**QWEN_IMAGE)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift((width // 16) * (height // 16))
    )
    sigmas = scheduler.sigmas.tolist()
    assert len(sigmas) == steps + 1
    assert sigmas[: len(first)] == pytest.approx(first, abs=1e-6)
    assert sigmas[len(sigmas) - len(last) :] == pytest.approx(last, abs=1e-6)
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)


LIGHTNING = {
    4: [1, 0.9, 0.75, 0.5, 0],
    8: [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0],
}


@pytest.mark.parametrize("steps", LIGHTNING)
@pytest.mark.parametrize("tokens", [256, 4096, 6889])
def test_lightning_schedule_does_not_depend_on_size(steps, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(lightning_config())
    c = scheduler.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    assert mu == math.log(3)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert scheduler.sigmas.tolist() == pytest.approx(LIGHTNING[steps], abs=1e-6)


@pytest.mark.parametrize("name", ["default", "qwen", "lightning", "karras", "stochastic", "inverted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("begin", [None, 2])
def test_loop_has_diffusers_bits(name, dtype, begin):
    results = []
    for scheduler in pair(CONFIGS[name]):
        generator = torch.Generator().manual_seed(3)
        sample = torch.randn(2, 5, 4, generator=generator).to(dtype)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6), mu=0.8)
        if begin is not None:
            scheduler.set_begin_index(begin)
            assert scheduler.begin_index == begin
        states = []
        for i, t in enumerate(scheduler.timesteps[begin or 0 :]):
            v = torch.randn(2, 5, 4, generator=generator).to(dtype)
            if i % 2:
                sample = scheduler.step(v, t, sample, generator=generator, return_dict=False)[0]
            else:
                sample = scheduler.step(v, t, sample, generator=generator).prev_sample
            assert scheduler.step_index == i + 1 + (begin or 0)
            states.append(sample)
        results.append(states)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)
    assert not torch.equal(results[0][0], results[0][-1])


def test_step_follows_the_formula():
    scheduler = FlowMatchEulerDiscreteScheduler(**QWEN_IMAGE)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.7)
    x, v = torch.randn(3, 4), torch.randn(3, 4)
    out = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    expected = x.double() + (scheduler.sigmas[1] - scheduler.sigmas[0]).double() * v.double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


def test_stochastic_noise_of_several_generators_is_diffusers():
    results = []
    for scheduler in pair(CONFIGS["stochastic"]):
        scheduler.set_timesteps(4, mu=0.7)
        generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
        x, v = torch.full((2, 3, 4), 0.25), torch.full((2, 3, 4), -0.5)
        results.append(scheduler.step(v, scheduler.timesteps[0], x, generator=generators).prev_sample)
    assert torch.equal(*results)
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("stochastic", [False, True])
def test_per_token_timesteps_have_diffusers_bits(stochastic):
    results = []
    for scheduler in pair({"shift": 3.0, "stochastic_sampling": stochastic}):
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(0)
        x, v = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 4, generator=generator).bfloat16()
        per_token = scheduler.timesteps[torch.randint(0, 6, (2, 5), generator=generator)]
        per_token[0, 0] = 0.0
        out = scheduler.step(v, scheduler.timesteps[0], x, generator=generator, per_token_timesteps=per_token)
        results.append(out.prev_sample)
    assert results[0].dtype == results[1].dtype == torch.float32
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["training", "begin", "running"])
def test_scale_noise_has_diffusers_bits(dtype, position):
    results = []
    for scheduler in pair(QWEN_IMAGE):
        scheduler.set_timesteps(8, mu=0.7)
        generator = torch.Generator().manual_seed(0)
        x, noise = (torch.randn(3, 4, 2, 2, generator=generator).to(dtype) for _ in range(2))
        if position != "training":
            scheduler.set_begin_index(3)
        if position == "running":
            scheduler.step(x, scheduler.timesteps[3], x)
        results.append(scheduler.scale_noise(x, scheduler.timesteps[[1, 4, 7]], noise))
    assert torch.equal(*results)
    assert results[0].dtype == dtype


def test_index_for_timestep_takes_the_second_of_equals():
    ours, theirs = pair({})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.5, 0.25])
    for t in (1000.0, 500.0, torch.tensor(500.0), torch.tensor(250.0)):
        assert ours.index_for_timestep(t) == theirs.index_for_timestep(t)
    assert ours.index_for_timestep(torch.tensor(2.0), torch.tensor([4.0, 2.0])) == 1


def test_time_shift_and_stretch_are_diffusers():
    for shift_type in ("exponential", "linear"):
        ours, theirs = pair({**QWEN_IMAGE, "time_shift_type": shift_type})
        t = torch.linspace(1.0, 0.1, 7)
        assert torch.equal(ours.time_shift(0.7, 1.3, t), theirs.time_shift(0.7, 1.3, t))
        assert torch.equal(ours.stretch_shift_to_terminal(t), theirs.stretch_shift_to_terminal(t))


def test_files_are_exchanged_with_diffusers(tmp_path):
    ours, theirs = pair({**QWEN_IMAGE, "shift": 1.25})
    ours.save_pretrained(tmp_path / "a" / "scheduler")
    theirs.save_pretrained(tmp_path / "b" / "scheduler")
    assert [p.name for p in (tmp_path / "a" / "scheduler").iterdir()] == ["scheduler_config.json"]
    read = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "a", subfolder="scheduler")
    assert {k: v for k, v in read.config.items() if k[0] != "_"} == ours.config
    back = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "b", subfolder="scheduler")
    assert back.config == ours.config
    again = FlowMatchEulerDiscreteScheduler.from_config(theirs.config, shift=3.0)
    assert again.shift == 3.0 and again.config.max_shift == 0.9


def test_configuration_of_another_scheduler_is_refused(tmp_path):
    diffusers.DDIMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of a DDIMScheduler, expected FlowMatchEulerDiscreteScheduler"):
        FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"shifts": 3.0}))
    with pytest.raises(ValueError, match=r"unknown field 'shifts' \(nearest known: 'shift'\)"):
        FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "at most one of use_karras_sigmas"),
        ({"time_shift_type": "cubic"}, "time_shift_type must be 'exponential' or 'linear', got 'cubic'"),
    ],
)
def test_bad_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchEulerDiscreteScheduler(**config)


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ({}, {"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({}, {"num_inference_steps": -3}, "num_inference_steps must be at least 1, got -3"),
        ({}, {}, "num_inference_steps must be at least 1, got None"),
        ({}, {"sigmas": []}, "num_inference_steps must be at least 1, got 0"),
        ({}, {"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "sigmas must have 3 entries, got 2"),
        ({}, {"num_inference_steps": 1, "timesteps": [900.0, 5.0]}, "timesteps must have 1 entries, got 2"),
        ({}, {"sigmas": [1.0, 0.5], "timesteps": [900.0]}, "timesteps must have 2 entries, got 1"),
        ({}, {"sigmas": [1.0, math.nan]}, "sigmas must be a list of finite numbers"),
        ({}, {"sigmas": [math.inf, 0.5]}, "sigmas must be a list of finite numbers"),
        ({}, {"sigmas": 0.5}, "sigmas must be a list of finite numbers"),
        ({}, {"timesteps": [math.nan]}, "timesteps must be a list of finite numbers"),
        (QWEN_IMAGE, {"num_inference_steps": 4}, "mu must be given with use_dynamic_shifting"),
        (QWEN_IMAGE, {"num_inference_steps": 4, "mu": math.nan}, "mu must be finite, got nan"),
        ({"shift": 3.0}, {"sigmas": [-0.5]}, r"shifted sigmas must be finite, got \[-inf\]"),
    ],
)
def test_bad_schedule_is_refused_and_changes_nothing(config, arguments, message):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    before = scheduler.sigmas.clone()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert torch.equal(scheduler.sigmas, before)


def test_one_step_goes_from_noise_to_the_image():
    scheduler = FlowMatchEulerDiscreteScheduler(**QWEN_IMAGE)
    scheduler.set_timesteps(sigmas=[1.0], mu=0.7)
    assert scheduler.sigmas.tolist() == [1.0, 0.0]


def test_beta_sigmas_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    scheduler = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    with pytest.raises(ImportError, match="use_beta_sigmas needs scipy"):
        scheduler.set_timesteps(4)


def test_step_refuses_indices_foreign_timesteps_and_the_end():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(2, 2)
    for index in (0, torch.tensor(0), torch.tensor(0, dtype=torch.int32)):
        with pytest.raises(ValueError, match="timestep must be one of scheduler.timesteps, not an index"):
            scheduler.step(x, index, x)
    with pytest.raises(ValueError, match="timestep must be one of scheduler.timesteps, got 7.5"):
        scheduler.step(x, 7.5, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="the schedule is at its end"):
        scheduler.step(x, t, x)
    scheduler.set_timesteps(2)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_scale_noise_needs_noise():
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="noise must be given"):
        scheduler.scale_noise(torch.zeros(1, 2), scheduler.timesteps[:1])

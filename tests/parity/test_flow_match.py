"""FlowMatchEulerDiscreteScheduler against diffusers: equal to the last bit over random points of the grid of
all its arguments; but for beta spacing, where our quantiles and scipy's differ by a rounding.

A stand-in for the model answers from (x, t), the same for both; every step's sample is compared.
"""

from __future__ import annotations

import logging
import random

import numpy
import pytest
import torch

from minidiff import FlowMatchEulerDiscreteScheduler

diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = {
    "num_train_timesteps": [1000, 100, 777], "shift": [1.0, 3.0, 0.5, 1.73],
    "use_dynamic_shifting": [False, False, True], "time_shift_type": ["exponential", "linear"],
    "shift_terminal": [None, None, 0.0, 0.1, 0.02], "invert_sigmas": [False, False, True],
    "stochastic_sampling": [False, True], "base_shift": [0.5, None], "max_image_seq_len": [4096, 8192],
}  # fmt: skip
SPACINGS = [{}, {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]


def both(**config) -> tuple:
    return FlowMatchEulerDiscreteScheduler(**config), diffusers.FlowMatchEulerDiscreteScheduler(**config)


def random_config(rng: random.Random) -> dict:
    return {name: rng.choice(values) for name, values in FIELDS.items()} | rng.choice(SPACINGS)


def random_steps(rng: random.Random, config: dict) -> dict:
    """n, levels, timesteps, or the last two together; and mu, where it is asked for."""
    n = rng.choice([2, 3, 5, 28] if config["shift_terminal"] else [1, 2, 3, 5, 28])
    fractions = [1.0, *sorted((rng.random() for _ in range(n)), reverse=True)][:n]
    T = config["num_train_timesteps"]
    sigmas, timesteps = {"sigmas": fractions}, {"timesteps": [T * f for f in fractions]}
    kind = rng.choice([{"num_inference_steps": n}, sigmas, timesteps, {**sigmas, **timesteps}])
    return kind | ({"mu": rng.choice([0.5, 0.83, 1.15])} if config["use_dynamic_shifting"] else {})


def same(a: torch.Tensor, b: torch.Tensor, exactly: bool = True) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=2e-6, atol=1e-9)


def walk(ours, theirs, dtype: torch.dtype, exactly: bool) -> None:
    """Both through the whole schedule, each step from the same sample."""
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=dtype)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    for t, t_theirs in zip(ours.timesteps, theirs.timesteps, strict=True):
        output = 0.4 * x + 0.2 * torch.sin(3 * x + t_theirs / 100)
        a = ours.step(output, t, x, generator=generators[0])
        b = theirs.step(output, t_theirs, x, generator=generators[1])
        assert len(a.to_tuple()) == len(b.to_tuple()) == 1 and ours.step_index == theirs.step_index
        if exactly:
            same(a.prev_sample, b.prev_sample)
        else:
            assert (a.prev_sample - b.prev_sample).abs().max() <= 4e-6 * b.prev_sample.abs().max()
        x = b.prev_sample


def test_grid() -> None:
    rng = random.Random("flow")
    for _ in range(1500):
        config = random_config(rng)
        ours, theirs = both(**config)
        same(ours.sigmas, theirs.sigmas)
        same(ours.timesteps, theirs.timesteps)
        assert (ours.sigma_min, ours.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
        given, exactly = random_steps(rng, config), not config.get("use_beta_sigmas")
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**given)
        same(ours.sigmas, theirs.sigmas, exactly)
        same(ours.timesteps, theirs.timesteps, exactly)
        dtype = rng.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16])
        if exactly or dtype in (torch.float32, torch.float64):
            walk(ours, theirs, dtype, exactly)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_number_of_steps(shift: float) -> None:
    ours, theirs = both(shift=shift)
    for n in [*range(1, 200), 999, 1000, 1001, 3000]:           # more than training timesteps, as upstream
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(n)
        same(ours.sigmas, theirs.sigmas)
        same(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_noise_is_scaled_alike(dtype: torch.dtype) -> None:
    """In training, at the start of image to image, and in the middle of inpainting."""
    ours, theirs = both(shift=3.0)
    x, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for prepare in (lambda s: None, lambda s: s.set_timesteps(10), lambda s: s.set_begin_index(6),
                    lambda s: s.step(x, s.timesteps[6], x)):
        for scheduler in (ours, theirs):
            prepare(scheduler)
        same(*(s.scale_noise(x, s.timesteps[[4, 5]], noise) for s in (ours, theirs)))
        assert (ours.begin_index, ours.step_index) == (theirs.begin_index, theirs.step_index)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_step_for_each_token(stochastic: bool, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 3, 7, 4, generator=rng).to(dtype)
    tokens = torch.rand(3, 7, generator=rng) * 1000
    found = []
    for scheduler in both(stochastic_sampling=stochastic):
        scheduler.set_timesteps(5)
        found.append(scheduler.step(
            output, scheduler.timesteps[1], x, generator=torch.Generator().manual_seed(1),
            per_token_timesteps=tokens, return_dict=False)[0])
    same(*found)


def test_small_methods_give_upstreams_numbers() -> None:
    for kind in ("exponential", "linear"):
        ours, theirs = both(time_shift_type=kind, shift_terminal=0.1)
        for dtype in (numpy.float32, numpy.float64):
            t = numpy.linspace(1, 0.01, 9).astype(dtype)
            for sigma in (1.0, 2.0):
                same(ours.time_shift(0.7, sigma, torch.from_numpy(t)),
                     torch.from_numpy(theirs.time_shift(0.7, sigma, t)))
            same(ours.stretch_shift_to_terminal(torch.from_numpy(t)),
                 torch.from_numpy(theirs.stretch_shift_to_terminal(t)))
    for scheduler in (ours, theirs):
        scheduler.set_shift(2.5)
        scheduler.set_timesteps(7)
    assert ours.shift == theirs.shift == 2.5
    same(ours.sigmas, theirs.sigmas)
    twice = torch.tensor([900.0, 500.0, 500.0])
    assert ours.index_for_timestep(500.0, twice) == theirs.index_for_timestep(500.0, twice) == 2


def test_config_files_both_ways(tmp_path) -> None:
    rng = random.Random(0)
    for _ in range(20):
        ours, theirs = both(**random_config(rng))
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "theirs").config == ours.config
        opened = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "ours")
        known = {name for name in opened.config if not name.startswith("_")}
        assert {**ours.config.to_dict()} == {name: opened.config[name] for name in known}


def test_arguments_by_place_mean_the_same() -> None:
    ours, theirs = (kind(500, 3.0, True, 0.4, 1.2, 128, 2048, False, 0.1)
                    for kind in (FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler))
    assert all(theirs.config[name] == value for name, value in ours.config.to_dict().items())


def test_no_pipeline_of_stable_diffusion_takes_it_upstream_either() -> None:
    _, theirs = both()
    assert not hasattr(theirs, "init_noise_sigma") and not hasattr(theirs, "scale_model_input")
    assert theirs.compatibles == [diffusers.FlowMatchEulerDiscreteScheduler]

"""DDPMScheduler against diffusers: exactly equal over a grid of all arguments."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch

from minidiff import DDPMScheduler

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", "other")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing")


def both(**config) -> tuple[DDPMScheduler, diffusers.DDPMScheduler]:
    return DDPMScheduler(**config), diffusers.DDPMScheduler(**config)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit; where upstream's own maths gives NaN (eps at zero SNR), so must ours."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@pytest.mark.parametrize("schedule,zero", list(itertools.product(SCHEDULES, (False, True))))
def test_tables(schedule: str, zero: bool) -> None:
    for T, start, end in ((1000, 0.0001, 0.02), (1000, 0.00085, 0.012), (50, 0.001, 0.2)):
        ours, theirs = both(beta_schedule=schedule, rescale_betas_zero_snr=zero, num_train_timesteps=T,
                            beta_start=start, beta_end=end)
        for name in ("betas", "alphas", "alphas_cumprod"):
            assert same(getattr(ours, name), getattr(theirs, name)), name


def test_trained_betas() -> None:
    values = [0.1, 0.2, 0.3, 0.05]
    ours, theirs = both(trained_betas=values, num_train_timesteps=4)
    assert same(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("spacing,offset", list(itertools.product(SPACINGS, (0, 1))))
def test_timesteps_of_every_count(spacing: str, offset: int) -> None:
    ours, theirs = both(timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 1001):
        if spacing == "leading" and offset and steps == 1000:
            # upstream reaches t = 1000, outside its tables; ours refuses (tests/test_minidiff_ddpm.py)
            continue
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        upstream = theirs.timesteps.tolist()
        # trailing: a float stride overshoots for 62 counts, and the schedule ends in t = -1
        if len(upstream) > steps:
            assert spacing == "trailing" and upstream.pop() == -1
        assert ours.timesteps.tolist() == upstream, steps


@pytest.mark.parametrize("schedule,variance", list(itertools.product(SCHEDULES, VARIANCES)))
def test_step(schedule: str, variance: str) -> None:
    """Every prediction, spacing, clipping and terminal SNR; at the first, a middle and the last timestep."""
    learned = variance in ("learned", "learned_range")
    for prediction, spacing, zero, clip in itertools.product(PREDICTIONS, SPACINGS, (False, True), range(4)):
        ours, theirs = both(
            beta_schedule=schedule, variance_type=variance, prediction_type=prediction,
            timestep_spacing=spacing,
            rescale_betas_zero_snr=zero, steps_offset=clip % 2, thresholding=clip == 1, clip_sample=clip < 2,
            clip_sample_range=0.7 if clip == 0 else 1.0, sample_max_value=1.5, dynamic_thresholding_ratio=0.9)
        ours.set_timesteps(7)
        theirs.set_timesteps(7)
        g = torch.Generator().manual_seed(clip)
        x, output = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 6 if learned else 3, 4, 4,
                                                                      generator=g)
        if variance == "learned":
            output = output.abs()   # a variance
        for t in theirs.timesteps[[0, 3, 6]]:
            mine = ours.step(output, t, x, generator=torch.Generator().manual_seed(1))
            other = theirs.step(output, t, x, generator=torch.Generator().manual_seed(1))
            assert same(mine.prev_sample, other.prev_sample), (prediction, spacing, zero, clip, int(t))
            assert same(mine.pred_original_sample, other.pred_original_sample)


@pytest.mark.parametrize("timesteps", [[900, 500, 3], [999, 998, 0]])
def test_custom_timesteps(timesteps: list[int]) -> None:
    ours, theirs = both()
    ours.set_timesteps(timesteps=timesteps)
    theirs.set_timesteps(timesteps=timesteps)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in timesteps:
        g1, g2 = (torch.Generator().manual_seed(1) for _ in range(2))
        assert same(ours.step(output, t, x, generator=g1)[0], theirs.step(output, t, x, generator=g2)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_noising_and_velocity(dtype: torch.dtype) -> None:
    for schedule in SCHEDULES:
        ours, theirs = both(beta_schedule=schedule)
        x, noise = torch.randn(4, 3, 4, 4).to(dtype), torch.randn(4, 3, 4, 4).to(dtype)
        t = torch.tensor([0, 10, 500, 999])
        assert same(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
        assert same(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t))


def test_generators_draw_the_same_streams() -> None:
    ours, theirs = both()
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for make in (lambda: torch.Generator().manual_seed(5),
                 lambda: [torch.Generator().manual_seed(i) for i in (1, 2)]):
        assert same(ours.step(output, 500, x, generator=make())[0],
                    theirs.step(output, 500, x, generator=make())[0])
    torch.manual_seed(3)
    mine = ours.step(output, 500, x)[0]
    torch.manual_seed(3)
    assert same(mine, theirs.step(output, 500, x)[0])


def test_configs_open_both_ways(tmp_path) -> None:
    ours, theirs = both(beta_schedule="scaled_linear", timestep_spacing="trailing",
                        prediction_type="v_prediction")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert DDPMScheduler.from_pretrained(tmp_path / "theirs").config == ours.config
    opened = diffusers.DDPMScheduler.from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in opened.config.items() if not k.startswith("_")} == \
           {k: v for k, v in theirs.config.items() if not k.startswith("_")}

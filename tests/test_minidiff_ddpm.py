"""DDPMScheduler without upstream: pinned numbers, decided departures, clear errors."""

from __future__ import annotations

import numpy
import pytest
import torch

from minidiff import DDPMScheduler
from minidiff.config import ConfigError
from minidiff.schedule import randn


@pytest.mark.parametrize("schedule,total",
                         [("linear", 10.05), ("scaled_linear", 7.174287), ("sigmoid", 10.05),
                                            ("squaredcos_cap_v2", 12.441496), ("laplace", 2.396614)])
def test_sum_of_betas(schedule: str, total: float) -> None:
    assert DDPMScheduler(beta_schedule=schedule).betas.sum().item() == pytest.approx(total, rel=1e-5)


def test_variances_upstream_pins() -> None:
    scheduler = DDPMScheduler()
    assert scheduler._get_variance(0) == pytest.approx(0, abs=1e-5)
    assert scheduler._get_variance(487) == pytest.approx(0.00979, abs=1e-5)
    assert scheduler._get_variance(999) == pytest.approx(0.02, abs=1e-5)


def test_timesteps() -> None:
    def chosen(spacing: str, offset: int = 0) -> list[int]:
        scheduler = DDPMScheduler(timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(10)
        return scheduler.timesteps.tolist()

    assert chosen("leading", 1) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert chosen("trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert chosen("linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


def test_noise_and_velocity_undo_each_other() -> None:
    """x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v, whatever t."""
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    x0, eps, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([1, 500, 999])
    x_t, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    for i in range(3):
        back = scheduler.step(v[i:i + 1], int(t[i]), x_t[i:i + 1]).pred_original_sample
        assert torch.allclose(back, x0[i:i + 1], atol=1e-5)


def test_an_all_knowing_model_samples_the_picture() -> None:
    """With the true eps at every step, DDPM ends at x0 exactly: its last step adds no noise."""
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    x0, g = torch.rand(1, 1, 8, 8) * 2 - 1, torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 8, 8, generator=g)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t]
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        x = scheduler.step(eps, t, x, generator=g).prev_sample
    assert torch.allclose(x, x0, atol=1e-4)


def test_zero_snr_is_pure_noise_at_the_end() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    noise = torch.randn(1, 1, 4, 4)
    assert torch.equal(scheduler.add_noise(torch.ones(1, 1, 4, 4), noise, torch.tensor([999])), noise)


def test_departure_fixed_large_log_is_finite_and_equals_fixed_large() -> None:
    """Upstream takes the square root of a logarithm here and gives NaN."""
    x, output = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    steps = [DDPMScheduler(variance_type=kind).step(output, 500, x,
                                                    generator=torch.Generator().manual_seed(0))
             for kind in ("fixed_large", "fixed_large_log")]
    assert torch.allclose(steps[0].prev_sample, steps[1].prev_sample, atol=1e-6)


def test_departure_a_timestep_beyond_training_is_refused() -> None:
    """Upstream yields t = 1000 here and fails later with an IndexError."""
    with pytest.raises(ValueError, match="1000"):
        DDPMScheduler(timestep_spacing="leading", steps_offset=1).set_timesteps(1000)


def test_departure_trailing_gives_as_many_timesteps_as_asked() -> None:
    """Upstream's float stride overshoots for 62 of the 1000 counts and ends in t = -1."""
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    for steps in (61, 103, 1000):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps and scheduler.timesteps[-1] >= 0


@pytest.mark.parametrize("arguments", [{}, {"num_inference_steps": 0}, {"num_inference_steps": 1001},
                                       {"timesteps": []}, {"timesteps": [5, 5]}, {"timesteps": [1, 2]},
                                       {"timesteps": [1000, 3]},
                                       {"num_inference_steps": 3, "timesteps": [3, 2]}])
def test_bad_schedules_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError):
        DDPMScheduler().set_timesteps(**arguments)


def test_bad_timesteps_are_refused() -> None:
    x = torch.randn(2, 1, 4, 4)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match="0 .. 999"):
            DDPMScheduler().add_noise(x, x, torch.tensor([5, t]))
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="not in the schedule"):
        scheduler.step(x, 5, x)


@pytest.mark.parametrize("fields,words", [
    ({"beta_schedule": "quadratic"}, "beta_schedule = 'quadratic'"),
    ({"prediction_type": "noise"}, "prediction_type"),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ({"trained_betas": []}, "trained_betas.* must have 1"),
    ({"steps_ofset": 1}, "unknown field 'steps_ofset'"),
])
def test_bad_configs_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DDPMScheduler(**fields)


@pytest.mark.filterwarnings("error:.*trained_betas")
def test_departure_trained_betas_say_how_many_timesteps_there_are() -> None:
    """For two betas and 1000 timesteps upstream gives timestep 980 and fails in step; here T is two."""
    DDPMScheduler(num_train_timesteps=2, trained_betas=numpy.array([0.1, 0.3]))     # nothing to warn of
    with pytest.warns(UserWarning, match="1000, but there are 2 trained_betas: timesteps lie in 0 .. 1"):
        scheduler = DDPMScheduler(trained_betas=numpy.array([0.1, 0.3]))
    assert len(scheduler) == 2 and scheduler.timesteps.tolist() == [1, 0]
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="0 .. 1, got"):
        scheduler.add_noise(x, x, torch.tensor([2]))
    with pytest.raises(ValueError, match="1 .. 2"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="0 .. 1"):
        scheduler.set_timesteps(timesteps=[2])
    with pytest.raises(IndexError):
        scheduler.step(x, 2, x)
    scheduler.set_timesteps(2)
    assert scheduler.step(x, 1, x).prev_sample.shape == x.shape


def test_previous_timestep() -> None:
    scheduler = DDPMScheduler()
    assert scheduler.previous_timestep(7) == 6
    scheduler.set_timesteps(timesteps=torch.tensor([100, 50, 0]))
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [50, 0, -1]


def test_a_list_of_generators_is_one_for_each_picture() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in (3, 4)]

    both = randn((2, 1, 4, 4), generators(), torch.device("cpu"), torch.float32)
    alone = randn((1, 1, 4, 4), generators()[1], torch.device("cpu"), torch.float32)
    assert torch.equal(both[1:], alone)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 1, 4, 4), generators(), torch.device("cpu"), torch.float32)

"""Rectified flow without upstream: the sampler's exact answers, oddities and errors; the two objectives."""

from __future__ import annotations

import json

import pytest
import torch

from miniclip.config import ConfigError
from miniclip.files import WeightsError
from minidiff import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from minidiff.objective import OBJECTIVES, load_scheduler, objective_in, objective_of
from minidiff.pipeline_folder import SCHEDULERS

PICTURE = torch.linspace(-0.9, 0.9, 30).view(1, 3, 2, 5)


def walked(scheduler: FlowMatchEulerDiscreteScheduler, x: torch.Tensor, answer) -> torch.Tensor:
    """The whole walk; `answer` gives eps - x0 from x and sigma."""
    generator = torch.Generator().manual_seed(1)
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(answer(x, sigma), t, x, generator=generator).prev_sample
    return x


# -------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("fields, given, wanted", [       # as diffusers 0.42 gives them
    ({}, {"num_inference_steps": 4}, [1000, 667, 334, 1]),
    ({"shift": 3.0}, {"num_inference_steps": 4}, [1000, 857.692, 602.151, 8.929]),
    ({}, {"sigmas": [1, 0.75, 0.5, 0.25]}, [1000, 750, 500, 250]),
    ({"shift": 3.0}, {"timesteps": [1000, 500]}, [1000, 500]),
    ({"use_dynamic_shifting": True}, {"sigmas": [1, 0.5], "mu": 1.0}, [1000, 731.0586]),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"sigmas": [1, 0.5], "mu": 3},
     [1000, 750]),
    ({"shift_terminal": 0.1}, {"sigmas": [1, 0.75, 0.5]}, [1000, 550, 100]),
    ({"invert_sigmas": True}, {"sigmas": [1, 0.75]}, [0, 250]),
])  # fmt: skip
def test_schedules(fields: dict, given: dict, wanted: list[float]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**fields)
    scheduler.set_timesteps(**given)
    assert scheduler.timesteps.tolist() == pytest.approx(wanted, abs=1e-3)
    assert scheduler.sigmas[-1] == (1 if "invert_sigmas" in fields else 0)
    assert len(scheduler.sigmas) == len(wanted) + 1 and scheduler.num_inference_steps == len(wanted)


def test_oddities_of_upstream_that_stay() -> None:
    """Each is pinned, and equal to upstream by tests/parity."""
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(10)                     # ten steps, of which the last covers a thousandth of the way
    assert plain.sigmas[-2].item() == pytest.approx(0.001)
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert shifted.sigma_min == pytest.approx(once)
    shifted.set_timesteps(10)                   # shifted twice
    assert shifted.sigmas[-2].item() == pytest.approx(3 * once / (1 + 2 * once))
    shifted.set_timesteps(timesteps=[1000, 500])            # the timestep as given, its level shifted
    assert shifted.timesteps[1] == 500 and shifted.sigmas[1].item() == pytest.approx(0.75)
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    inverted.set_timesteps(timesteps=[900.0, 100.0])        # given timesteps are not read
    assert inverted.timesteps.tolist() == pytest.approx([100, 900])
    plain.set_timesteps(sigmas=[1.0, 0.5])
    x = torch.ones(1, 2, 3)                     # no churn; and a step for each token goes the other way
    assert plain.step(x, plain.timesteps[0], x, s_churn=9.0, s_noise=3.0).prev_sample.eq(0.5).all()
    plain.set_timesteps(sigmas=[1.0, 0.5])
    found = plain.step(x, plain.timesteps[0], x, per_token_timesteps=torch.tensor([[1000.0, 400.0]]))
    assert found.prev_sample.tolist() == [[[1.5] * 3, [pytest.approx(1.4)] * 3]]


def test_set_shift_is_of_the_next_schedule() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.shift == 3.0 and scheduler.sigmas[1].item() == 0.75 and scheduler.config.shift == 1.0


# ------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
                                     {"use_beta_sigmas": True}, {"shift": 3.0}])
def test_a_perfect_model_of_one_picture_gives_that_picture(spacing: dict, stochastic: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**spacing, stochastic_sampling=stochastic)
    scheduler.set_timesteps(6)
    x = torch.randn(PICTURE.shape, generator=torch.Generator().manual_seed(0))
    assert (walked(scheduler, x, lambda x, sigma: (x - PICTURE) / sigma) - PICTURE).abs().max() < 1e-5


def test_more_steps_are_closer_to_the_exact_path() -> None:
    """Data N(0, 0.5^2): eps - x0 given x is x (sigma - 0.25 (1 - sigma)) / variance, and x ends at 0.5 x."""
    def end(n: int) -> float:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - i / n for i in range(n)])
        return walked(scheduler, torch.ones(1, 1, 1, 1, dtype=torch.float64),
                      lambda x, s: x * (s - 0.25 * (1 - s)) / (s**2 + 0.25 * (1 - s) ** 2)).item()

    errors = [abs(end(n) - 0.5) for n in (5, 20, 80)]
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.3 * errors[1] and errors[2] < 0.01


def test_kinds_of_numbers_stay() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scheduler.set_timesteps(4)
        x = torch.ones(1, 1, 2, 2, dtype=dtype)
        (x_prev,) = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
        assert x_prev.dtype == scheduler.scale_noise(x, scheduler.timesteps[:1], x).dtype == dtype


def test_what_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    for given in ({}, {"num_inference_steps": 0}, {"num_inference_steps": 2.5}, {"sigmas": []}):
        with pytest.raises(ValueError, match="num_inference_steps = "):
            scheduler.set_timesteps(**given)
    for given in ({"num_inference_steps": 3, "sigmas": [1, 0.5]}, {"sigmas": [1, 0.5], "timesteps": [1000]}):
        with pytest.raises(ValueError, match="each"):
            scheduler.set_timesteps(**given)
    with pytest.raises(ValueError, match="needs mu"):
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).set_timesteps(4)
    with pytest.raises(ValueError, match="two steps or more"):          # upstream: levels that are no numbers
        FlowMatchEulerDiscreteScheduler(shift_terminal=0.1).set_timesteps(1)
    with pytest.raises(ConfigError, match="only one of"):
        FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True)
    for fields in ({"time_shift_type": "cubic"}, {"shift": 0}, {"shift_terminal": 2}, {"no_such_field": 1}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            FlowMatchEulerDiscreteScheduler(**fields)
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="whole number"):
        scheduler.step(x, 1000, x)
    with pytest.raises(ValueError, match="not in the schedule"):
        scheduler.scale_noise(x, torch.tensor([3.5]), x)
    with pytest.raises(ValueError, match="0 .. 1000"):
        scheduler.add_noise(x, x, torch.tensor([1001.0]))
    walked(scheduler, x, lambda x, sigma: x)
    with pytest.raises(IndexError, match="all 2 steps are done"):
        scheduler.step(x, scheduler.timesteps[0], x)


# ----------------------------------------------------------------------------------------------------- config


def test_fields_by_place_and_through_files(tmp_path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(500, 3.0, True)
    assert scheduler.config == FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=500, shift=3.0, use_dynamic_shifting=True).config
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text(encoding="utf-8"))
    assert written["_class_name"] == "FlowMatchEulerDiscreteScheduler" and written["shift"] == 3.0
    assert not [name for name in written if "beta_" in name and name != "use_beta_sigmas"]
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).config == scheduler.config
    assert len(scheduler) == len(scheduler.timesteps) == 500


def test_what_travels_to_other_samplers_and_back() -> None:
    flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=3.0)
    euler = EulerDiscreteScheduler.from_config(flow.config)
    assert len(euler) == 500 and euler.config["shift"] == 3.0
    assert FlowMatchEulerDiscreteScheduler.from_config(euler.config).config == flow.config
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        DPMSolverMultistepScheduler.from_config(
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)


def test_models_of_diffusion_and_of_flow_are_apart() -> None:
    """No pipeline of Stable Diffusion opens a folder with it: there it would draw noise."""
    assert FlowMatchEulerDiscreteScheduler().compatibles == [FlowMatchEulerDiscreteScheduler]
    assert FlowMatchEulerDiscreteScheduler not in DDPMScheduler().compatibles
    assert "FlowMatchEulerDiscreteScheduler" not in SCHEDULERS and len(SCHEDULERS) == 7


# --------------------------------------------------------------------------------------------------- training


def test_training_follows_the_straight_path() -> None:
    scheduler, generator = OBJECTIVES["flow"].fresh(), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = scheduler.timesteps_at(torch.tensor([0.0, 0.25, 0.999]))
    assert t.tolist() == pytest.approx([0, 250, 999])
    x_t = scheduler.add_noise(x0, eps, t)
    assert (x_t[1] - (0.75 * x0[1] + 0.25 * eps[1])).abs().max() < 1e-7
    target = scheduler.training_target(x0, eps, t)
    assert torch.equal(target, eps - x0)
    assert (scheduler.predict_x0(target[1:2], x_t[1:2], 250) - x0[1:2]).abs().max() < 1e-7
    assert scheduler.signal_and_noise(250) == (0.75, 0.25) and scheduler.prediction_kind == "flow_prediction"
    # with the timesteps of its own schedule, the same as upstream's scale_noise
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        t = scheduler.timesteps[[0, 400, 999]]
        assert torch.allclose(scheduler.add_noise(x0, eps, t), scheduler.scale_noise(x0, t, eps), atol=1e-6)
    assert scheduler.timesteps_at(torch.tensor([0.5])).item() == 750        # shifted, as the sampler's are


@pytest.mark.parametrize("name", ["diffusion", "flow"])
def test_each_objective_samples_as_it_trains(tmp_path, name: str) -> None:
    scheduler = OBJECTIVES[name].fresh()
    assert objective_of(scheduler) is OBJECTIVES[name]
    scheduler.save_pretrained(tmp_path)
    assert objective_in(tmp_path) == name and load_scheduler(tmp_path).config == scheduler.config
    x = torch.randn(PICTURE.shape, generator=torch.Generator().manual_seed(0))
    timesteps, step = objective_of(scheduler).walk(scheduler, 5, None)
    assert len(timesteps) == 5
    for t in timesteps:                         # a model that knows the picture, and so what noise it sees
        alpha, sigma = scheduler.signal_and_noise(t.item())
        eps = (x - alpha * PICTURE) / sigma
        output = scheduler.training_target(PICTURE, eps, t[None])
        x = step(output, t, x).prev_sample
    assert (x - PICTURE).abs().max() < 1e-3


def test_a_scheduler_of_any_other_name_is_read_as_before(tmp_path) -> None:
    DDIMScheduler(beta_end=0.5).save_pretrained(tmp_path)
    assert type(load_scheduler(tmp_path)) is DDPMScheduler and load_scheduler(tmp_path).config.beta_end == 0.5
    for name in (["x"], 3, None):
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name}), encoding="utf-8")
        assert objective_in(tmp_path) == "diffusion"
    (tmp_path / "scheduler_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match="scheduler_config.json"):
        load_scheduler(tmp_path)


def test_equal_configs_are_not_unequal() -> None:
    """A default that was given is an entry of its own, but the same value: == and != agree on it."""
    given, left = (FlowMatchEulerDiscreteScheduler(**fields).config for fields in ({"shift": 1.0}, {}))
    assert dict(given) != dict(left) and given == left and not given != left
    assert given != FlowMatchEulerDiscreteScheduler(shift=2.0).config

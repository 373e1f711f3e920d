"""The samplers without upstream: exact answers where the mathematics gives them, upstream's schedules,
clear errors."""

import copy
import dataclasses
import inspect
import json
import math
import pickle

import numpy
import pytest
import torch

from miniclip.config import ConfigError
from minidiff import samplers
from minidiff.samplers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    base,
)
from minidiff.samplers.ddim import DDIMConfig
from minidiff.samplers.ddpm import DDPMScheduler
from minidiff.schedule import Scheduler

torch.set_num_threads(1)

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EVERY = [
    (DDIMScheduler, {"clip_sample": False}),
    (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    (PNDMScheduler, {"set_alpha_to_one": True}),
    (EulerDiscreteScheduler, {}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    (EulerDiscreteScheduler, {"use_beta_sigmas": True}),
    (EulerAncestralDiscreteScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverMultistepScheduler, {"solver_order": 3, "use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"use_lu_lambdas": True, "solver_type": "heun"}),
    (LCMScheduler, {"timestep_scaling": 1e6}),  # boundary scalings 0 and 1, else it keeps some noise
]


def levels(scheduler, t):
    """(alpha, sigma) of the model's input at a timestep, in variance-preserving form."""
    if hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[scheduler.step_index or 0].double()
        return 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
    alpha_bar = scheduler.alphas_cumprod[int(t)].double()
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def sample(scheduler, x, answer):
    """The whole loop; `answer` gives eps from the scaled input and its (alpha, sigma)."""
    generator = torch.Generator().manual_seed(1)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t)
        eps = answer(inputs, *levels(scheduler, t))
        if scheduler.config.prediction_type == "v_prediction":
            a, s = levels(scheduler, t)
            eps = a * eps - s * (inputs - s * eps) / a
        extra = {} if isinstance(scheduler, PNDMScheduler) else {"generator": generator}
        x = scheduler.step(eps.to(x.dtype), t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("cls", "config"), EVERY)
def test_a_perfect_model_of_one_picture_gives_that_picture(cls, config, prediction_type):
    """If all data is one picture, eps = (x - a picture) / s exactly, and every sampler must end at it."""
    picture = torch.linspace(-0.9, 0.9, 30).view(1, 3, 2, 5)
    scheduler = cls(**STABLE_DIFFUSION, **config, prediction_type=prediction_type)
    scheduler.set_timesteps(8)
    x = torch.randn(1, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    end = sample(scheduler, x, lambda x, a, s: (x - a * picture) / s)
    # over steps whose v differ: inexact
    averages_v = cls is PNDMScheduler and prediction_type == "v_prediction"
    assert (end - picture).abs().max() < (0.1 if averages_v else 2e-3)


def gaussian_error(cls, steps, **config):
    """Data N(0, 0.5^2): eps and the path's end are known in closed form. The error of the sampler's end."""
    scheduler = cls(**STABLE_DIFFUSION, **config)
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def deviation(a, s):
        return (0.25 * a**2 + s**2) ** 0.5

    a, s = levels(scheduler, scheduler.timesteps[0])
    # init_noise_sigma starts at sigma, not at sqrt(sigma^2 + 1)
    if isinstance(scheduler, EulerDiscreteScheduler):
        x = x / s
    end = sample(scheduler, x, lambda x, a, s: x * s / deviation(a, s) ** 2)
    last = 0.5  # every coordinate moves in proportion to the deviation
    return abs(end.item() * deviation(a, s).item() / last - 1)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
        (EulerDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {"solver_order": 1}),
        (DPMSolverMultistepScheduler, {"solver_order": 2, "use_lu_lambdas": True}),
        (DPMSolverMultistepScheduler, {"solver_order": 3, "use_lu_lambdas": True}),
    ],
)
def test_more_steps_are_closer_to_the_exact_path(cls, config):
    few, many = gaussian_error(cls, 10, **config), gaussian_error(cls, 80, **config)
    assert many < 0.3 * few and many < 0.05


def test_higher_orders_are_more_accurate():
    first, second, third = (
        gaussian_error(DPMSolverMultistepScheduler, 40, solver_order=k, use_lu_lambdas=True)
        for k in (1, 2, 3)
    )
    assert second < 0.2 * first and third < 0.2 * first


SCHEDULES = [  # as diffusers 0.42 gives them
    (DDIMScheduler, {"steps_offset": 1}, 5, [801, 601, 401, 201, 1]),
    (DDIMScheduler, {"timestep_spacing": "trailing"}, 5, [999, 799, 599, 399, 199]),
    (DDIMScheduler, {"timestep_spacing": "linspace"}, 5, [999, 749, 500, 250, 0]),
    (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}, 5, [801, 601, 601, 401, 201, 1]),
    (PNDMScheduler, {}, 5, [800, 700, 700, 600, 600, 500, 500, 400, 400, 300, 300, 200, 200, 0]),
    (EulerDiscreteScheduler, {}, 5, [999, 749.25, 499.5, 249.75, 0]),
    (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}, 5, [801, 601, 401, 201, 1]),
    (DPMSolverMultistepScheduler, {"timestep_spacing": "leading", "steps_offset": 1}, 5,
     [831, 665, 499, 333, 167]),
    (DPMSolverMultistepScheduler, {}, 5, [999, 799, 599, 400, 200]),
    (LCMScheduler, {}, 4, [999, 759, 499, 259]),
]


@pytest.mark.parametrize(("cls", "config", "steps", "expected"), SCHEDULES)
def test_schedules(cls, config, steps, expected):
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == expected


def test_initial_deviation():
    """Euler on SDXL's schedule: sigma_max, or sqrt(sigma_max^2 + 1) with leading spacing."""
    a, b = (EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing=s) for s in ("trailing", "leading"))
    a.set_timesteps(1)
    assert a.init_noise_sigma.item() == pytest.approx(14.6146, abs=1e-4) and a.timesteps.tolist() == [999]
    b.set_timesteps(1000)
    assert b.init_noise_sigma.item() == pytest.approx(math.hypot(14.6146, 1), abs=1e-4)


def test_spacings():
    assert base.linspace(0, 1, 1) == [0] and base.linspace(5, 1, 3) == [5, 3, 1]
    karras = base.karras_sigmas(80.0, 0.002, 18)  # Karras 2022, the default of table 1
    assert karras[0] == pytest.approx(80) and karras[-1] == pytest.approx(0.002)
    assert karras[9] == pytest.approx(1.9233, 1e-4)
    for spacing in (base.karras_sigmas, base.exponential_sigmas, base.beta_sigmas):
        sigmas = spacing(14.6, 0.03, 9)
        assert sigmas == sorted(sigmas, reverse=True) and sigmas[0] == pytest.approx(14.6)


def test_beta_quantile():
    for p in (0.0, 1e-6, 0.1, 0.5, 0.9, 1.0):
        assert base.beta_quantile(p, 1, 1) == pytest.approx(p)              # uniform
        assert base.beta_quantile(p, 2, 1) == pytest.approx(math.sqrt(p))   # cdf x^2
        arcsine = math.sin(math.pi * p / 2) ** 2
        assert base.beta_quantile(p, 0.5, 0.5) == pytest.approx(arcsine, rel=1e-9)


@pytest.mark.parametrize(("cls", "config"), EVERY)
def test_what_is_refused(cls, config):
    scheduler = cls(**config)
    for steps in (0, -1, 1001, 2.5):
        with pytest.raises(ValueError, match=str(steps)):
            scheduler.set_timesteps(steps)
    x = torch.zeros(1, 1, 2, 2)
    if cls in (DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, LCMScheduler):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(x, 1, x)
    with pytest.raises(ConfigError, match="no_such_field"):
        cls(no_such_field=1)
    with pytest.raises(ConfigError, match="beta_schedule"):
        cls(beta_schedule="sqrt")


def test_a_timestep_that_comes_twice_means_its_second_place():
    dpm = DPMSolverMultistepScheduler()
    dpm.set_timesteps(timesteps=[999, 900, 900, 100])
    assert [dpm.index_for_timestep(t) for t in (999, 900, 100)] == [0, 2, 3]


@pytest.mark.parametrize("cls", [DDIMScheduler, PNDMScheduler])
def test_leading_spacing_cannot_leave_the_tables(cls):
    """Upstream hands out timestep 1000 here and fails inside step."""
    scheduler = cls(steps_offset=1, **({"skip_prk_steps": True} if cls is PNDMScheduler else {}))
    with pytest.raises(ValueError, match="1000"):
        scheduler.set_timesteps(1000)


def test_clear_errors_of_each_sampler():
    x = torch.zeros(1, 1, 2, 2)
    euler = EulerDiscreteScheduler()
    euler.set_timesteps(2)
    with pytest.raises(ValueError, match="whole number"):
        euler.step(x, 999, x)
    with pytest.raises(ValueError, match="not in the schedule"):
        euler.step(x, 3.5, x)
    for t in euler.timesteps:
        euler.step(x, t, x)
    with pytest.raises(IndexError, match="all 2 steps are done"):
        euler.step(x, euler.timesteps[0], x)
    for kwargs in ({}, {"num_inference_steps": 2, "sigmas": [1, 0]}, {"timesteps": [1.0], "sigmas": [1, 0]}):
        with pytest.raises(ValueError, match="exactly one"):
            euler.set_timesteps(**kwargs)
    with pytest.raises(ValueError, match="together"):
        EulerDiscreteScheduler(use_karras_sigmas=True).set_timesteps(timesteps=[5.0])
    with pytest.raises(ConfigError, match="only one of"):
        EulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ConfigError, match="sigma_min"):
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver")
    with pytest.raises(ConfigError, match="solver_order"):
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", solver_order=3,
                                    final_sigmas_type="sigma_min")
    with pytest.raises(ConfigError, match="algorithm_type"):
        DPMSolverMultistepScheduler(algorithm_type="unipc")
    with pytest.raises(ConfigError, match="prediction_type"):
        PNDMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="needs 4"):
        PNDMScheduler().set_timesteps(3)
    with pytest.raises(ValueError, match="50 steps"):
        LCMScheduler().set_timesteps(51)
    ddim = DDIMScheduler()
    ddim.set_timesteps(2)
    with pytest.raises(ValueError, match="variance_noise"):
        ddim.step(x, 500, x, eta=1.0, generator=torch.Generator(), variance_noise=x)


def test_ddim_takes_the_stride_and_not_the_next_entry():
    """A quirk that checkpoints are used with: 30 trailing steps list 999, 966, 932, ...,
    but step goes 999 -> 966 -> 933."""
    ddim = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    ddim.set_timesteps(30)
    assert ddim.timesteps[1:3].tolist() == [966, 932]
    x = torch.ones(1, 1, 1, 1)
    a, b = ddim.alphas_cumprod[966], ddim.alphas_cumprod[933]
    x0 = (x - (1 - a).sqrt() * x) / a.sqrt()
    assert torch.allclose(ddim.step(x, 966, x).prev_sample, b.sqrt() * x0 + (1 - b).sqrt() * x)


def test_ddim_with_eta_1_is_ddpm():
    """Song 2021: eta = 1 over all timesteps is the ancestral sampler with fixed_small."""
    config = {"clip_sample": False, **STABLE_DIFFUSION}
    ddim, ddpm = DDIMScheduler(**config), DDPMScheduler(**config)
    ddim.set_timesteps(1000)
    ddpm.set_timesteps(1000)
    x, eps = torch.randn(2, 1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (999, 500, 1):
        a = ddim.step(eps, t, x, eta=1.0, generator=torch.Generator().manual_seed(3)).prev_sample
        b = ddpm.step(eps, t, x, generator=torch.Generator().manual_seed(3)).prev_sample
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("cls", "config"), EVERY)
def test_same_seed_same_picture_and_no_state_left_over(cls, config):
    scheduler = cls(**config)
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    ends = []
    for _ in range(2):  # the second run starts anew with set_timesteps
        scheduler.set_timesteps(6)
        ends.append(sample(scheduler, x, lambda x, a, s: 0.3 * x))
    assert torch.equal(*ends)
    # arguments stay as they were
    assert x.equal(torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("cls", "config"), EVERY)
def test_half_precision_stays(cls, config):
    scheduler = cls(**config)
    scheduler.set_timesteps(4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        scheduler.set_timesteps(4)
        x = torch.ones(1, 1, 2, 2, dtype=dtype)
        t = scheduler.timesteps[0]
        assert scheduler.scale_model_input(x, t).dtype == dtype
        assert scheduler.step(x, t, x).prev_sample.dtype == dtype


def test_noising_follows_the_schedule():
    x0, eps = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0)
    euler, dpm = EulerDiscreteScheduler(**STABLE_DIFFUSION), DPMSolverMultistepScheduler(**STABLE_DIFFUSION)
    for scheduler in (euler, dpm):
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[[1, 3]]
        sigma = scheduler.sigmas[[1, 3]].view(2, 1, 1, 1)
        x = scheduler.add_noise(x0, eps, t)
        scale = 1.0 if scheduler is euler else (sigma**2 + 1) ** 0.5
        assert torch.allclose(x * scale, x0 + sigma * eps)
        v = scheduler.get_velocity(x0, eps, t)
        a, s = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
        assert torch.allclose(v, a * eps - s * x0, atol=1e-6)
        with pytest.raises(ValueError, match="not in the schedule"):
            scheduler.add_noise(x0, eps, torch.tensor([3, 4]))


def test_from_config_carries_what_was_set():
    pndm = PNDMScheduler(**STABLE_DIFFUSION, steps_offset=1, skip_prk_steps=True)
    for cls in (getattr(samplers, n) for n in samplers.__all__ if n.endswith("Scheduler")):
        other = cls.from_config(pndm.config)
        assert other.config["beta_end"] == 0.012 and other.config["steps_offset"] == 1
        back = PNDMScheduler.from_config(other.config)
        assert back.config == pndm.config
    dpm = DPMSolverMultistepScheduler.from_config(pndm.config, use_karras_sigmas=True, algorithm_type="deis")
    assert dpm.config.use_karras_sigmas and dpm.config.algorithm_type == "dpmsolver++"


@pytest.mark.parametrize(("cls", "config"), EVERY)
def test_config_file_round_trip(tmp_path, cls, config):
    scheduler = cls(**STABLE_DIFFUSION, **config)
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config == scheduler.config


def test_outputs_read_like_upstreams():
    ddim = DDIMScheduler()
    ddim.set_timesteps(2)
    x = torch.ones(1, 1, 1, 1)
    out = ddim.step(x, 500, x)
    assert out.prev_sample is out[0] is out["prev_sample"] and out[1] is out.pred_original_sample
    assert all(torch.equal(a, b) for a, b in zip(out.to_tuple(), ddim.step(x, 500, x, return_dict=False),
                                                 strict=True))
    lcm = LCMScheduler()
    lcm.set_timesteps(2)
    out = lcm.step(x, lcm.timesteps[0], x)
    assert out[1] is out.denoised


def test_a_config_built_directly_travels_as_well():
    """What differs from the defaults was set on purpose; defaults stay behind."""
    ddim = DDIMScheduler(DDIMConfig(beta_end=0.012))
    euler = EulerDiscreteScheduler.from_config(ddim.config)
    assert euler.config.beta_end == 0.012 and euler.config.timestep_spacing == "linspace"


# ------------------------------------------------------------------ what users of diffusers type out of habit

ALL = [getattr(samplers, name) for name in samplers.__all__ if name.endswith("Scheduler")]
DIFFUSION = [cls for cls in ALL if issubclass(cls, Scheduler)]
every_class = pytest.mark.parametrize("cls", ALL)
of_diffusion = pytest.mark.parametrize("cls", DIFFUSION)


@of_diffusion
def test_fields_by_place(cls):
    assert cls(500, 0.001, 0.01, "linear", None).config == cls(
        num_train_timesteps=500, beta_start=0.001, beta_end=0.01, beta_schedule="linear").config
    with pytest.raises(TypeError, match="beta_schedule, trained_betas by place, all other fields by name"):
        cls(500, 0.001, 0.01, "linear", None, True)
    with pytest.raises(TypeError, match="num_train_timesteps"):
        cls(500, num_train_timesteps=400)


@of_diffusion
def test_options_of_loading_and_saving(tmp_path, cls):
    scheduler = cls(steps_offset=1)
    scheduler.save_config(save_directory=tmp_path / "a" / "scheduler", token="x")
    habits = {"cache_dir": "x", "torch_dtype": torch.float16, "local_files_only": True, "variant": "fp16"}
    loaded = cls.from_pretrained(tmp_path / "a", subfolder="scheduler", beta_end=0.5, **habits)
    assert loaded.config.steps_offset == 1 and loaded.config.beta_end == 0.5
    assert not set(habits) & set(loaded.config)
    read = cls.load_config(tmp_path / "a", subfolder="scheduler", **habits)
    assert read["_class_name"] == cls.__name__ and cls.from_config(read).config == scheduler.config
    assert json.loads(scheduler.to_json_string()) == read and cls.__name__ in repr(scheduler)
    for action in (lambda: cls.from_pretrained(tmp_path / "a" / "scheduler", return_unused_kwargs=True),
                   lambda: cls.from_config(read, return_unused_kwargs=True),
                   lambda: cls.load_config(tmp_path / "a" / "scheduler", return_commit_hash=True),
                   lambda: scheduler.save_pretrained(tmp_path, push_to_hub=True),
                   lambda: scheduler.save_config(tmp_path, repo_id="me/it")):
        with pytest.raises(ValueError, match="is not supported; "):
            action()
    with pytest.raises(TypeError, match="no_such_option"):
        scheduler.save_pretrained(tmp_path, no_such_option=1)
    with pytest.raises(ConfigError, match="no_such_field"):
        cls.from_pretrained(tmp_path / "a" / "scheduler", no_such_field=1)
    with pytest.raises(TypeError, match="a folder goes into from_pretrained"):
        cls.from_config(str(tmp_path))


@of_diffusion
def test_configs_are_equal_as_dicts(tmp_path, cls):
    """A config that was read from a complete file has no defaults any more."""
    scheduler = cls(beta_end=0.5)
    assert "beta_start" in scheduler.config["_use_default_values"]
    scheduler.save_pretrained(tmp_path)
    read = cls.from_pretrained(tmp_path).config
    assert "_use_default_values" not in read and read == scheduler.config
    assert {k: v for k, v in scheduler.config.items() if k != "_use_default_values"} == read
    assert read.given == {**read} and pickle.loads(pickle.dumps(read)) == read


@every_class
def test_what_is_left_out_says_what_to_do(cls):
    scheduler = cls()
    tables = [vars(kind)["left_out"] for kind in cls.__mro__ if "left_out" in vars(kind)]
    names = {name: reason for table in tables for name, reason in table.items()}
    assert "push_to_hub" in names and all(reason[0].islower() for reason in names.values())
    for name, reason in names.items():
        assert not hasattr(scheduler, name)
        with pytest.raises(AttributeError) as error:
            getattr(scheduler, name)
        assert str(error.value) == f"{cls.__name__}.{name} is left out: {reason}"
    with pytest.raises(AttributeError, match=f"^'{cls.__name__}' object has no attribute 'no_such_name'$"):
        scheduler.no_such_name  # noqa: B018


@of_diffusion
def test_fields_can_be_read_from_the_sampler(cls):
    with pytest.warns(FutureWarning, match=r"read \.config\.beta_end"):
        assert cls(beta_end=0.5).beta_end == 0.5
    for copied in (copy.deepcopy(cls(beta_end=0.5)), pickle.loads(pickle.dumps(cls(beta_end=0.5)))):
        assert copied.config.beta_end == 0.5
    assert not hasattr(cls.__new__(cls), "beta_end")


@of_diffusion
def test_compatibles(cls):
    scheduler = cls(steps_offset=1, beta_end=0.5)
    assert scheduler.compatibles == DIFFUSION
    for other in scheduler.compatibles:
        there = other.from_config(scheduler.config)
        assert there.config.beta_end == 0.5 and cls.from_config(there.config).config == scheduler.config


@every_class
def test_a_number_of_steps_from_numpy(cls):
    a, b = cls(), cls()
    a.set_timesteps(numpy.int64(10))
    b.set_timesteps(10)
    assert a.timesteps.equal(b.timesteps) and a.timesteps.dtype == b.timesteps.dtype
    assert "device" in inspect.signature(cls.set_timesteps).parameters


@of_diffusion
@pytest.mark.filterwarnings("ignore:.*trained_betas")
def test_betas_of_ones_own_say_how_many_timesteps_there_are(tmp_path, cls):
    """Upstream: an IndexError in step, or (Euler, DPM-Solver) the last level for all timesteps beyond."""
    betas = numpy.linspace(0.01, 0.3, 8)
    scheduler = cls(trained_betas=betas)
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).betas.equal(scheduler.betas)
    assert len(scheduler) == len(scheduler.timesteps) == 8
    with pytest.raises(ValueError, match="8"):
        scheduler.set_timesteps(9)
    if cls is LCMScheduler:
        scheduler.set_timesteps(4, original_inference_steps=8)
    else:
        scheduler.set_timesteps(4)
    assert 0 <= min(scheduler.timesteps) and max(scheduler.timesteps) < 8


def test_names_of_single_samplers():
    with pytest.raises(ValueError, match="mu is not supported; .* flow_shift"):
        DPMSolverMultistepScheduler().set_timesteps(5, mu=1.0)
    dpm = DPMSolverMultistepScheduler()
    assert torch.allclose(dpm.alpha_t**2 + dpm.sigma_t**2, torch.ones(1000))
    lcm = LCMScheduler()
    lcm.set_timesteps(timesteps=[999, 500, 20])
    assert lcm.custom_timesteps and [lcm.previous_timestep(t).item() for t in lcm.timesteps] == [500, 20, -1]
    assert lcm.index_for_timestep(20, torch.tensor([999, 20])) == 1
    assert lcm.get_scalings_for_boundary_condition_discrete(5) == lcm.boundary_scalings(5)
    pndm = PNDMScheduler()
    pndm.set_timesteps(10)
    assert [*pndm.prk_timesteps, *pndm.plms_timesteps] == pndm.timesteps.tolist()
    assert len(pndm.prk_timesteps) == 12
    ddim = DDIMScheduler()
    assert ddim._get_variance(420, 400).item() == pytest.approx(0.14771, abs=1e-5)


def test_a_pipeline_of_diffusers_can_mend_an_early_config():
    """It writes to this name; defaults stay defaults, so that the next sampler has its own."""
    ddim = DDIMScheduler(beta_end=0.012)
    ddim._internal_dict = {**ddim.config, "steps_offset": 1, "clip_sample": False}
    ddim.set_timesteps(2)
    assert ddim.timesteps.tolist() == [501, 1] and ddim.config.clip_sample is False
    assert ddim._internal_dict is ddim.config and ddim.config.given == {"beta_end": 0.012}


@pytest.mark.filterwarnings("ignore:num_train_timesteps")
@pytest.mark.parametrize("cls", [getattr(samplers, n) for n in samplers.__all__ if n.endswith("Scheduler")])
def test_no_config_is_too_much(cls):
    """Each field with values that no schedule has: one ValueError line, or a sampler that takes its step."""
    odd = [0, -1, 2**63, 10**39, 1e25, -1e25, math.inf, math.nan, "", [], [0.0], [[1]], None, True, {}]
    x = torch.zeros(1, 1, 2, 2)
    for name, value in [(f.name, v) for f in dataclasses.fields(cls.config_class) for v in odd]:
        try:
            scheduler = cls(cls.config_class.from_dict({name: value}, "scheduler_config.json"))
            scheduler.set_timesteps(3)
            scheduler.step(x, scheduler.timesteps[0], x)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, (name, value)


@pytest.mark.parametrize("fields", [
    {"num_train_timesteps": 10**9}, {"num_train_timesteps": 2**63}, {"beta_start": 1e25}, {"beta_start": -1},
    {"beta_start": -1, "beta_schedule": "scaled_linear"}, {"beta_start": 0.1, "beta_end": 0},
    {"trained_betas": [2.0]}, {"trained_betas": [0.1] * 200_000}, {"timestep_scaling": 1e300},
    {"beta_schedule": "x" * 10**6}, {"original_inference_steps": 10**12}, {"steps_offset": -1},
])  # fmt: skip
def test_schedules_have_bounds(fields):
    with pytest.raises(ConfigError) as caught:
        samplers.LCMScheduler(**fields)
    assert len(str(caught.value)) < 400 and next(iter(fields)) in str(caught.value)

"""The samplers of diffusion against diffusers' over random points of the grid of all their arguments;
test_flow_match.py holds the one of flow.

A stand-in for the UNet answers from (x, t), the same for both; every step's sample is compared.
`SMALL` is float32 rounding; sigma tables are equal to a unit in the last place,
since numpy's logarithm is not torch's.
"""

import inspect
import itertools
import logging
import math
import random

import pytest
import torch

from minidiff import samplers
from tests.parity.compare import relative_error
from tests.parity.test_pipeline import family, run

diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SMALL = 4e-6

COMMON = {
    "num_train_timesteps": [1000, 100],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.02, 0.012],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
}
PREDICTIONS = {"prediction_type": ["epsilon", "sample", "v_prediction"]}
THRESHOLDING = {"thresholding": [False, True], "dynamic_thresholding_ratio": [0.995, 0.8],
                "sample_max_value": [1.0, 2.0]}
ZERO_SNR = {"rescale_betas_zero_snr": [False, True]}
SPACINGS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]

GRID = {
    "DDIMScheduler": {
        **COMMON, **PREDICTIONS, **THRESHOLDING, **ZERO_SNR, "clip_sample": [True, False],
        "clip_sample_range": [1.0, 0.5], "set_alpha_to_one": [True, False],
    },
    "PNDMScheduler": {
        **COMMON, "prediction_type": ["epsilon", "v_prediction"], "skip_prk_steps": [True, False],
        "set_alpha_to_one": [True, False],
    },
    "EulerDiscreteScheduler": {
        **COMMON, **PREDICTIONS, **ZERO_SNR, "interpolation_type": ["linear", "log_linear"], "": SPACINGS,
        "sigma_min": [None, 0.03], "sigma_max": [None, 10.0], "timestep_type": ["discrete", "continuous"],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    "EulerAncestralDiscreteScheduler": {**COMMON, **ZERO_SNR, "prediction_type": ["epsilon", "v_prediction"]},
    "DPMSolverMultistepScheduler": {
        **COMMON, "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"], **THRESHOLDING,
        **ZERO_SNR, "solver_order": [1, 2, 3], "solver_type": ["midpoint", "heun", "bh2"],
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
        "lower_order_final": [True, False], "euler_at_final": [True, False],
        "": [*SPACINGS, {"use_lu_lambdas": True}, {"use_flow_sigmas": True, "flow_shift": 3.0}],
        "final_sigmas_type": ["zero", "sigma_min"], "lambda_min_clipped": [-math.inf, -5.1],
        "variance_type": [None, "learned_range"],
    },
    "LCMScheduler": {
        **COMMON, **PREDICTIONS, **THRESHOLDING, **ZERO_SNR, "original_inference_steps": [50, 20],
        "clip_sample": [True, False], "set_alpha_to_one": [True, False], "timestep_scaling": [10.0, 1.0],
    },
}  # fmt: skip


def random_config(name, rng):
    config = {}
    for field, values in GRID[name].items():
        value = rng.choice(values)
        config.update(value if field == "" else {field: value})
    if name.startswith("DPM"):
        if not config["algorithm_type"].endswith("++"):
            config["final_sigmas_type"] = "sigma_min"
            if config["prediction_type"] == "flow_prediction":
                config["prediction_type"] = "epsilon"
        if config["algorithm_type"] == "sde-dpmsolver":
            config["solver_order"] = min(config["solver_order"], 2)
    return config


def model(x, t):
    """Something smooth of x and t."""
    t = float(t)
    return 0.4 * x + 0.2 * torch.sin(3 * x + t / 100) + 0.1 * math.cos(t)


def relative(a, b):
    """Largest difference over largest value; 0 where both are not finite in the same places."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(torch.isfinite(a), torch.isfinite(b))
    a, b = a[torch.isfinite(a)], b[torch.isfinite(b)]
    return relative_error(a, b, least=1e-3) if len(a) else 0.0


def build(name, config):
    return getattr(samplers, name)(**config), getattr(diffusers, name)(**config)


def compare_schedules(ours, theirs):
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    # upstream truncates a computed T - 1 that numpy's logarithm may leave at T - 1.00000001: only the first,
    # by one
    truncated = any(ours.config.get(name) for name in ("use_exponential_sigmas", "use_beta_sigmas"))
    first = int(truncated and ours.timesteps.dtype == torch.int64)
    assert (ours.timesteps[:first] - theirs.timesteps[:first]).abs().sum() <= 1
    assert relative(ours.timesteps[first:].double(), theirs.timesteps[first:].double()) <= 2e-6
    if ours.timesteps.dtype == torch.int64:
        assert torch.equal(ours.timesteps[first:], theirs.timesteps[first:])
    if hasattr(theirs, "sigmas"):
        assert relative(ours.sigmas, theirs.sigmas) <= 2e-6
    assert abs(float(ours.init_noise_sigma) / float(theirs.init_noise_sigma) - 1) <= 2e-6


def walk(ours, theirs, dtype, rng, **kwargs):
    """Both through the whole schedule, each step from the same sample; the largest difference."""
    shape = (2, 3, 4, 5)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1000)), dtype=dtype)
    x = noise * float(ours.init_noise_sigma)
    worst = 0.0
    if len(set(ours.timesteps.tolist())) < len(ours.timesteps) and hasattr(theirs, "set_begin_index"):
        # a timestep twice: both would start at the second of them and run over the end
        ours.set_begin_index(0)
        theirs.set_begin_index(0)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    for t, t_theirs in zip(ours.timesteps, theirs.timesteps, strict=True):
        inputs = ours.scale_model_input(x, t), theirs.scale_model_input(x, t_theirs)
        worst = max(worst, relative(*inputs))
        output = model(inputs[1], t_theirs)
        results = []
        for scheduler, time, generator in ((ours, t, generators[0]), (theirs, t_theirs, generators[1])):
            extra = {} if "PNDM" in type(scheduler).__name__ else {"generator": generator}
            results.append(scheduler.step(output, time, x, **extra, **kwargs))
        for a, b in zip(results[0].to_tuple(), results[1].to_tuple(), strict=True):
            worst = max(worst, relative(a, b))
        x = results[1].prev_sample
        if not torch.isfinite(x).all():  # epsilon with zero terminal SNR; both agree that it is not finite
            break
    return worst


def steps_for(name, config, rng):
    if name == "LCMScheduler":
        return rng.choice([1, 2, 4, 7])
    n = rng.choice([2, 3, 5, 14, 16] if not config.get("lambda_min_clipped", 0) < -9
                   else [1, 2, 3, 5, 14, 16])
    return max(n, 4) if config.get("skip_prk_steps") is False else n


@pytest.mark.parametrize("name", GRID)
def test_grid(name):
    rng = random.Random(name)
    worst, exact = 0.0, 0
    runs = 250
    for _ in range(runs):
        config = random_config(name, rng)
        ours, theirs = build(name, config)
        n = steps_for(name, config, rng)
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        compare_schedules(ours, theirs)
        kwargs = {}
        if name == "DDIMScheduler":
            kwargs = {"eta": rng.choice([0.0, 0.5, 1.0]), "use_clipped_model_output": rng.random() < 0.5}
        if name == "EulerDiscreteScheduler":
            kwargs = rng.choice([{}, {"s_churn": 2.0},
                                 {"s_churn": 40.0, "s_noise": 1.1, "s_tmin": 0.5, "s_tmax": 8.0}])
        dtype = rng.choice([torch.float32, torch.float64])
        difference = walk(ours, theirs, dtype, rng, **kwargs)
        assert difference <= SMALL, (difference, config, n, kwargs, dtype)
        worst, exact = max(worst, difference), exact + (difference == 0.0)
    print(f"\n{name}: {runs} configurations, largest relative difference {worst:.1e}, exactly 0 in {exact}")


@pytest.mark.parametrize("name", GRID)
def test_every_number_of_steps(name):
    """The schedules alone, for every n; upstream's trailing spacing is wrong at some n (the next test)."""
    for spacing, offset in itertools.product(["linspace", "leading", "trailing"], [0, 1]):
        config = {"timestep_spacing": spacing, "steps_offset": offset, "num_train_timesteps": 200}
        if name == "PNDMScheduler":
            config["skip_prk_steps"] = True
        ours, theirs = build(name, config)
        for n in range(1, 51 if name == "LCMScheduler" else 200):
            if spacing == "leading" and offset and n > 100:  # t = 200 is outside the tables
                continue
            theirs.set_timesteps(n)
            if spacing == "trailing" and -1 in theirs.timesteps.tolist():
                continue
            ours.set_timesteps(n)
            compare_schedules(ours, theirs)


@pytest.mark.parametrize("name", [n for n in GRID if n != "LCMScheduler"])
def test_trailing_spacing_gives_the_steps_that_were_asked_for(name):
    """61 steps of 1000: upstream's float arithmetic makes 62 and ends at timestep -1. Ours makes 61."""
    config = {"timestep_spacing": "trailing", **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})}
    ours, theirs = build(name, config)
    ours.set_timesteps(61)
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1 and ours.timesteps[-1] == 15
    assert len(ours.timesteps) == len(theirs.timesteps) - 1


@pytest.mark.parametrize("name", GRID)
def test_add_noise_and_image_to_image(name):
    for spacing in ("linspace", "leading", "trailing"):
        config = {"timestep_spacing": spacing, "beta_schedule": "scaled_linear"}
        ours, theirs = build(name, config)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
        x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        for dtype in (torch.float32, torch.float16):
            pair = [s.add_noise(x.to(dtype), noise.to(dtype), s.timesteps[[4, 5]]) for s in (ours, theirs)]
            assert relative(*pair) <= (2e-3 if dtype == torch.float16 else 1e-6)
        if hasattr(theirs, "set_begin_index"):  # as pipelines do: begin at 6 of 10
            for scheduler in (ours, theirs):
                scheduler.set_begin_index(6)
            if name != "LCMScheduler":
                pair = [s.add_noise(x, noise, s.timesteps[6:7].repeat(2)) for s in (ours, theirs)]
                assert relative(*pair) <= 1e-6
            pair = [s.step(x, s.timesteps[6], x, generator=torch.Generator().manual_seed(0))
                    for s in (ours, theirs)]
            assert relative(pair[0].prev_sample, pair[1].prev_sample) <= 1e-6


def test_euler_custom_schedules():
    ours, theirs = build("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"})
    for kwargs in ({"sigmas": [14.6, 5.0, 1.3, 0.2, 0.0]}, {"timesteps": [999, 700.5, 300, 1]}):
        ours.set_timesteps(**kwargs)
        theirs.set_timesteps(**kwargs)
        compare_schedules(ours, theirs)
        assert walk(ours, theirs, torch.float32, random.Random(0)) <= SMALL


def test_dpmsolver_and_lcm_custom_timesteps():
    ours, theirs = build("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
    for timesteps in ([999, 700, 300, 1], [999, 900, 900, 100]):
        ours.set_timesteps(timesteps=timesteps)
        theirs.set_timesteps(timesteps=timesteps)
        compare_schedules(ours, theirs)
        assert relative(*[torch.stack([s.sigmas]) for s in (ours, theirs)]) <= 1e-6
    ours, theirs = build("LCMScheduler", {})
    for kwargs in (
        {"timesteps": [999, 500, 20]},
        {"timesteps": [999, 500, 20], "strength": 0.7},
        {"num_inference_steps": 4, "strength": 0.5},
        {"num_inference_steps": 8, "original_inference_steps": 100},
    ):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**kwargs)
        compare_schedules(ours, theirs)


@pytest.mark.parametrize("name", GRID)
def test_given_noise_and_lists_of_generators(name):
    ours, theirs = build(name, {"num_train_timesteps": 100}
                         | ({"algorithm_type": "sde-dpmsolver++"} if "DPM" in name else {}))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = ours.timesteps[0]
    for s in (ours, theirs):
        s.scale_model_input(x, t)
    if "PNDM" not in name:
        extra = {"eta": 1.0} if "DDIM" in name else {}
        lists = [[torch.Generator().manual_seed(i) for i in (3, 4)] for _ in range(2)]
        a, b = (s.step(x, t, x, generator=g, **extra)[0] for s, g in zip((ours, theirs), lists, strict=True))
        assert relative(a, b) <= 1e-6
    if "DDIM" in name or "DPM" in name:
        extra = {"eta": 1.0} if "DDIM" in name else {}
        a, b = (s.step(x, s.timesteps[1], x, variance_noise=noise, **extra)[0] for s in (ours, theirs))
        assert relative(a, b) <= 1e-6


ALL = ["DDPMScheduler", *GRID]
FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations([*ALL, FLOW], 2)))
def test_from_config_across_samplers(source, target):
    """As users do: DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)."""
    stable_diffusion = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    }  # fmt: skip
    for config in (stable_diffusion, {}, {"timestep_spacing": "leading", "num_train_timesteps": 500}):
        given = {k: v for k, v in config.items() if k in getattr(diffusers, source)().config}
        a = getattr(samplers, target).from_config(getattr(samplers, source)(**given).config)
        b = getattr(diffusers, target).from_config(getattr(diffusers, source)(**given).config)
        for field in set(a.config) & set(b.config) - {"_use_default_values"}:
            theirs = b.config[field]
            assert a.config[field] == (tuple(theirs) if isinstance(theirs, list) else theirs), field
        a.set_timesteps(10)
        b.set_timesteps(10)
        assert relative(a.timesteps.double(), b.timesteps.double()) <= 1e-6


@pytest.mark.parametrize("name", GRID)
def test_config_files_both_ways(tmp_path, name):
    ours, theirs = build(name, {"beta_schedule": "scaled_linear", "steps_offset": 1,
                                "num_train_timesteps": 100})
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a = getattr(samplers, name).from_pretrained(tmp_path / "theirs")
    b = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert a.config == ours.config
    for field, value in ours.config.to_dict().items():
        assert b.config[field] == value


# -------------------------------------------------------------------------- every public name, every argument

# what goes into a config and comes out of it (tests/test_minidiff_samplers.py calls them)
REWORDED = {"from_config", "from_pretrained", "load_config"}
UNREAD = {"args", "kwargs", "options"}      # upstream's catch arguments of earlier versions


@pytest.mark.parametrize("name", [*ALL, FLOW])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_public_name_is_here_or_says_why_not(name):
    ours, theirs = build(name, {})
    reasons = {k for kind in type(ours).__mro__ for k in vars(kind).get("left_out", ())}
    public = {n for n in dir(theirs) if not n.startswith("_")}
    assert {n for n in public if not hasattr(ours, n)} == reasons
    for method in public - reasons - REWORDED:
        if callable(getattr(theirs, method)):
            wanted, found = (list(inspect.signature(getattr(s, method)).parameters.values())
                             for s in (theirs, ours))
            names = [p.name for p in wanted if p.name not in UNREAD]
            assert [p.name for p in found if p.name not in UNREAD][:len(names)] == names, method
            given = {p.name: p.default for p in found if p.default is not p.empty}
            assert all(p.default == given.get(p.name, p.default) for p in wanted), method


@pytest.mark.parametrize("name", ALL)
def test_arguments_by_place_mean_the_same(name):
    """But ours travel as what was given; upstream takes them for defaults, and loses them in from_config."""
    ours, theirs = (getattr(library, name)(200, 0.001, 0.01, "linear", None)
                    for library in (samplers, diffusers))
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert "beta_end" in ours.config.given and "beta_end" in theirs.config["_use_default_values"]


def test_small_methods_give_upstreams_numbers():
    ours, theirs = build("DDIMScheduler", {"set_alpha_to_one": False})
    for t, t_prev in ((0, -20), (20, 0), (420, 400), (999, 998)):
        assert torch.equal(ours._get_variance(t, t_prev), theirs._get_variance(t, t_prev))
    for name, kwargs in (("DDPMScheduler", {}), ("LCMScheduler", {"original_inference_steps": 100})):
        ours, theirs = build(name, {})
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(7, **kwargs)
        assert [ours.previous_timestep(t) for t in ours.timesteps] == \
               [theirs.previous_timestep(t) for t in theirs.timesteps]
    for t in (0, 5, 999):
        assert [float(c) for c in ours.boundary_scalings(t)] == \
               [float(c) for c in theirs.get_scalings_for_boundary_condition_discrete(t)]
    for skip, n in itertools.product((True, False), (4, 10, 50)):
        ours, theirs = build("PNDMScheduler", {"skip_prk_steps": skip})
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(n)
        assert ours.prk_timesteps == list(theirs.prk_timesteps)
        assert ours.plms_timesteps == list(theirs.plms_timesteps)
    ours, theirs = build("DPMSolverMultistepScheduler", {})
    for table in ("alpha_t", "sigma_t", "lambda_t"):
        assert torch.equal(getattr(ours, table), getattr(theirs, table))


# ------------------------------------------------------------------------ our samplers in diffusers' pipeline


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = family("sd1", tmp_path_factory.mktemp("sd1"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return {**pipe.components, "requires_safety_checker": False}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore")
def test_the_same_picture_from_a_pipeline_of_diffusers(parts, name, early):
    """Also where that pipeline mends an early SD 1 config, and after a swap back to diffusers' own sampler.

    Its from_pretrained(scheduler=...) takes none but SchedulerMixin; the constructor and `pipe.scheduler` do.
    """
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config |= {} if early else {"steps_offset": 1}
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    found = []
    for scheduler in build(name, config):
        pipe = diffusers.StableDiffusionPipeline(**{**parts, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        steps, picture = run(pipe, prompt="a herb shop", num_inference_steps=4)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        more, _ = run(pipe, prompt="a herb shop", num_inference_steps=2)
        found.append((steps + more, picture))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert relative(a, b) <= 1e-5
    assert (found[0][1] - found[1][1]).abs().max() <= 1 / 255

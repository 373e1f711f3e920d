"""`pipe.scheduler = B.from_config(pipe.scheduler.config)`, as everybody types it: every pair of samplers, in
every way that a pipeline comes by its first one, walks the timesteps and levels that diffusers walks.

What was given travels, a default does not; also where the pipeline mends an early SD 1 config, and through
files and chains of conversions.
"""

import itertools
import json
import logging
import shutil

import pytest
import torch

from minidiff import samplers
from minidiff.__main__ import SAMPLERS as FLAGS
from minidiff.__main__ import arguments, load
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.pipeline_folder import SCHEDULERS
from tests.parity.test_pipeline import family, run

diffusers = pytest.importorskip("diffusers")
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

ALL = [name for name in samplers.__all__ if name.endswith("Scheduler")]
NAMES = list(SCHEDULERS)            # those that pipelines of Stable Diffusion take, here and in diffusers
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# what the files of early SD 1, of SD 1.5, of SDXL and of a zero-SNR model say
GIVEN = {"early": BETAS, "sd15": {**BETAS, "steps_offset": 1},
         "sdxl": {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
         "trailing": {**BETAS, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
         "defaults given": {**BETAS, "steps_offset": 0, "clip_sample": True, "timestep_spacing": "linspace"}}


def accepted(name, given):
    """The fields of `given` that this sampler of diffusers takes."""
    known = getattr(diffusers, name)().config
    return {k: v for k, v in given.items() if k in known}


def made(library, name, given):
    return getattr(library, name)(**given)


def assert_same_walk(ours, theirs):
    known = {k for k in theirs.config if not k.startswith("_")}
    for field in known & set(ours.config):
        value = theirs.config[field]
        assert ours.config[field] == (tuple(value) if isinstance(value, list) else value), field
    skips = theirs.config.get("skip_prk_steps", True)
    for n in ((5, 20) if skips else (20,)):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert torch.allclose(ours.timesteps.double(), theirs.timesteps.double(), rtol=1e-6), n
        if hasattr(theirs, "sigmas"):
            assert torch.allclose(ours.sigmas.double(), theirs.sigmas.double(), rtol=1e-6), n


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def parts(folder):
    """The parts of one pipeline, ours and diffusers'."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    names = ("vae", "text_encoder", "tokenizer", "unet")
    ours = StableDiffusionPipeline.from_pretrained(folder)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {n: getattr(ours, n) for n in names}, {**{n: getattr(theirs, n) for n in names}, **rest}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("source", NAMES)
def test_by_the_constructor(parts, source, given):
    given = accepted(source, GIVEN[given])
    for target in NAMES:
        ours = StableDiffusionPipeline(**parts[0], scheduler=made(samplers, source, given))
        theirs = diffusers.StableDiffusionPipeline(**parts[1], scheduler=made(diffusers, source, given))
        assert_same_walk(ours.scheduler, theirs.scheduler)
        ours.scheduler = getattr(samplers, target).from_config(ours.scheduler.config)
        theirs.scheduler = getattr(diffusers, target).from_config(theirs.scheduler.config)
        assert_same_walk(ours.scheduler, theirs.scheduler)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("source", NAMES)
def test_by_a_folder_and_by_flag(folder, tmp_path, source, given):
    here = tmp_path / "pipe"
    shutil.copytree(folder, here)
    values = {"_class_name": source, **accepted(source, GIVEN[given])}
    (here / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    index = json.loads((here / "model_index.json").read_text())
    (here / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", source]}))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(here, local_files_only=True)
    ours = StableDiffusionPipeline.from_pretrained(here)
    assert_same_walk(ours.scheduler, theirs.scheduler)
    for flag, target in FLAGS.items():
        usual = {"skip_prk_steps": True} if flag == "pndm" else {}
        expected = getattr(diffusers, target).from_config(theirs.scheduler.config, **usual)
        assert_same_walk(getattr(samplers, target).from_config(ours.scheduler.config, **usual), expected)
        by_flag = load(arguments(["--model", str(here), "--prompt", "x", "--sampler", flag]))
        assert_same_walk(by_flag.scheduler, expected)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("first", ALL)
def test_chains(tmp_path, first, given):
    """Three samplers in a row, once directly and once with a file between; and back to the first."""
    given = accepted(first, GIVEN[given])
    for second, third in itertools.product(ALL, ALL):
        found = []
        for library, folder in ((samplers, tmp_path / "ours"), (diffusers, tmp_path / "theirs")):
            start = made(library, first, given)
            middle = getattr(library, second).from_config(start.config)
            middle.save_pretrained(folder)
            stored = getattr(library, third).from_pretrained(folder)
            direct = getattr(library, third).from_config(middle.config)
            back = getattr(library, first).from_config(direct.config)
            found.append((direct, stored, back))
        for ours, theirs in zip(*found, strict=True):
            assert_same_walk(ours, theirs)


@pytest.mark.parametrize("name", ALL)
def test_across_libraries(name):
    """diffusers' from_config takes our config, and ours theirs."""
    for given in GIVEN.values():
        for target in ALL:
            ours = made(samplers, name, accepted(name, given))
            theirs = made(diffusers, name, accepted(name, given))
            there = getattr(diffusers, target).from_config(ours.config)
            here = getattr(samplers, target).from_config(theirs.config)
            assert_same_walk(here, there)
            assert_same_walk(here, getattr(diffusers, target).from_config(theirs.config))


@pytest.mark.parametrize("target", NAMES)
def test_the_picture(parts, target):
    """The case that drew a wrong picture: an early SD 1 config, then another sampler."""
    found = []
    for library, kind, mine in ((samplers, StableDiffusionPipeline, parts[0]),
                                (diffusers, diffusers.StableDiffusionPipeline, parts[1])):
        pipe = kind(**mine, scheduler=library.DDIMScheduler(**BETAS))
        usual = {"skip_prk_steps": True} if target == "PNDMScheduler" else {}
        pipe.scheduler = getattr(library, target).from_config(pipe.scheduler.config, **usual)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        found.append(run(pipe, prompt="a herb shop", num_inference_steps=5))
    (steps, picture), (their_steps, their_picture) = found
    for a, b in zip(steps, their_steps, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert (picture - their_picture).abs().max() <= 1 / 255

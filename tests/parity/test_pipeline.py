"""Whole pipelines: small random checkpoints of each family, written by diffusers, read and run by both.

The latents after every step must agree to 1e-5 in float32 and 1e-10 in float64, pictures to one grey level.
"""

import logging

import pytest
import torch

from miniclip.tokenizer import CLIPTokenizer
from minidiff import samplers
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.pipeline_folder import SCHEDULERS
from tests.parity.compare import relative_error

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = "a herb shop with ginseng and goji berries on wooden shelves, an old landscape painting 春 滿 乾 坤"
TOKENIZER = CLIPTokenizer.train([TEXT] * 20, vocab_size=600)
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def text_config(width=32, act="quick_gelu", **more):
    return transformers.CLIPTextConfig(
        vocab_size=len(TOKENIZER), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77, hidden_act=act, projection_dim=width, bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id, **more,
    )  # fmt: skip


def unet(**changes):
    config = {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 8,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def vae(**changes):
    return diffusers.AutoencoderKL(**{**dict(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    ), **changes})  # fmt: skip


def family(name, folder, seed=0):
    """Writes a small pipeline of a family with random weights."""
    torch.manual_seed(seed)
    TOKENIZER.save_pretrained(folder / "tok")
    tok = transformers.CLIPTokenizer.from_pretrained(folder / "tok")
    pndm = diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True)
    parts = dict(vae=vae(), text_encoder=transformers.CLIPTextModel(text_config()), tokenizer=tok,
                 scheduler=pndm)
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if name == "sd1":
        pipe = diffusers.StableDiffusionPipeline(unet=unet(), **parts, **rest)
    elif name == "sd2":
        parts["text_encoder"] = transformers.CLIPTextModel(text_config(act="gelu"))
        parts["scheduler"] = diffusers.DDIMScheduler(
            **SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
        )
        model = unet(use_linear_projection=True, attention_head_dim=[2, 4])
        pipe = diffusers.StableDiffusionPipeline(unet=model, **parts, **rest)
    elif name == "inpainting":
        pipe = diffusers.StableDiffusionInpaintPipeline(unet=unet(in_channels=9), **parts, **rest)
    elif name == "lcm":
        parts["scheduler"] = diffusers.LCMScheduler(**SD_BETAS)
        pipe = diffusers.StableDiffusionPipeline(unet=unet(time_cond_proj_dim=16), **parts, **rest)
    else:
        second = transformers.CLIPTextModelWithProjection(text_config(24, "gelu"))
        model = unet(
            cross_attention_dim=56, use_linear_projection=True, transformer_layers_per_block=[1, 2],
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=72,
        )  # fmt: skip
        parts["scheduler"] = diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading")
        parts["vae"] = vae(scaling_factor=0.13025, latents_mean=[0.1, -0.2, 0.3, 0.0],
                           latents_std=[1.1, 0.9, 1.2, 0.8]
                           if name == "sdxl-statistics" else None)  # fmt: skip
        tok_2 = transformers.CLIPTokenizer.from_pretrained(folder / "tok", pad_token="!")
        pipe = diffusers.StableDiffusionXLPipeline(
            unet=model, text_encoder_2=second, tokenizer_2=tok_2, **parts, add_watermarker=False
        )
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def both(folder, dtype, their_class=None):
    ours = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    their_class = their_class or diffusers.DiffusionPipeline
    theirs = their_class.from_pretrained(folder, torch_dtype=dtype, safety_checker=None,
                                         local_files_only=True) if (
        "XL" not in their_class.__name__
        and not ours.is_xl) else their_class.from_pretrained(folder, torch_dtype=dtype)
    theirs.set_progress_bar_config(disable=True)
    # transformers 5 took it away, diffusers' clip_skip wants it
    if not hasattr(theirs.text_encoder, "text_model"):
        object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)
    return ours, theirs


def run(pipe, seed=3, **kwargs):
    """(latents after every step, final picture)."""
    steps = []

    def note(pipe, i, t, values):
        steps.append(values["latents"].clone())
        return {}

    pictures = pipe(generator=torch.Generator().manual_seed(seed), callback_on_step_end=note,
                    output_type="pt", **kwargs)
    return steps, pictures.images


def agree(ours, theirs, dtype):
    (a, x), (b, y) = ours, theirs
    assert len(a) == len(b) > 0
    worst = 0.0
    for i, (u, v) in enumerate(zip(a, b, strict=True)):
        error = relative_error(u, v)
        worst = max(worst, error)
        assert error <= BOUND[dtype], f"step {i}: {error:.1e}"
    assert ((x * 255).round() - (y * 255).round()).abs().max() <= 1
    return worst


SAMPLERS = SCHEDULERS       # of diffusion models: no pipeline of upstream's takes flow's


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_every_sampler(folders, name, sampler, dtype):
    ours, theirs = both(folders(name), dtype)
    for extra in ({}, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}):
        if extra and not sampler.startswith("DPM"):
            continue
        ours.scheduler = SAMPLERS[sampler].from_config(ours.scheduler.config, **extra)
        theirs.scheduler = getattr(diffusers, sampler).from_config(theirs.scheduler.config, **extra)
        for guidance in (1.0, 4.0):
            call = dict(prompt="a herb shop", num_inference_steps=5, guidance_scale=guidance,
                        negative_prompt="goji")
            agree(run(ours, **call), run(theirs, **call), dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-statistics", "lcm"])
def test_text_to_image(folders, name, dtype):
    ours, theirs = both(folders(name), dtype)
    calls = [
        {"prompt": "a herb shop"},
        {"prompt": ["春 滿", "乾 坤"], "num_images_per_prompt": 2, "guidance_scale": 3.0},
        {"prompt": "goji", "negative_prompt": "ginseng", "height": 24, "width": 40},
        {"prompt": "goji " * 100, "guidance_scale": 2.0},
        {"prompt": "old", "clip_skip": 1},
        {"prompt": "old", "guidance_rescale": 0.7},
    ]
    if "xl" in name:
        calls += [{"prompt": "goji", "prompt_2": "ginseng", "negative_prompt": "a", "negative_prompt_2": "b"},
                  {"prompt": "goji", "original_size": (50, 60), "crops_coords_top_left": (3, 4),
                   "target_size": (9, 8)},
                  {"prompt": "goji", "negative_prompt": ""}]  # fmt: skip
    worst = 0.0
    for call in calls:
        call = {"num_inference_steps": 4, **call}
        worst = max(worst, agree(run(ours, **call), run(theirs, **call), dtype))
    print(f"\n{name} {dtype}: largest relative difference of latents {worst:.1e}")


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sdxl-statistics"])
@pytest.mark.parametrize("sampler", [None, "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_image_to_image(folders, name, sampler, dtype):
    kind = "StableDiffusionXLImg2ImgPipeline" if "xl" in name else "StableDiffusionImg2ImgPipeline"
    ours, theirs = both(folders(name), dtype, getattr(diffusers, kind))
    if sampler:
        ours.scheduler = SAMPLERS[sampler].from_config(ours.scheduler.config)
        theirs.scheduler = getattr(diffusers, sampler).from_config(theirs.scheduler.config)
    picture = torch.rand(1, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    for call in ({"strength": 0.6}, {"strength": 1.0}, {"strength": 0.4, "num_images_per_prompt": 2}):
        call = {"prompt": "a herb shop", "image": picture, "num_inference_steps": 6, "guidance_scale": 3.0,
                **call}
        agree(run(ours, **call), run(theirs, **call), dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", ["sd1", "inpainting", "sdxl"])
@pytest.mark.parametrize("sampler", [None, "EulerAncestralDiscreteScheduler"])
def test_inpainting(folders, name, sampler, dtype):
    kind = "StableDiffusionXLInpaintPipeline" if name == "sdxl" else "StableDiffusionInpaintPipeline"
    ours, theirs = both(folders(name), dtype, getattr(diffusers, kind))
    if sampler:
        ours.scheduler = SAMPLERS[sampler].from_config(ours.scheduler.config)
        theirs.scheduler = getattr(diffusers, sampler).from_config(theirs.scheduler.config)
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 4:12, 6:] = 0.9
    for call in ({}, {"strength": 0.6}, {"num_images_per_prompt": 2, "guidance_scale": 1.0}):
        call = {"strength": 1.0, **call}
        call = {"prompt": "goji", "image": picture, "mask_image": mask, "num_inference_steps": 5,
                "guidance_scale": 3.0, **call}
        sizes = {"height": 16, "width": 24}
        agree(run(ours, **call), run(theirs, **call, **sizes), dtype)


def test_pillow_pictures(folders):
    Image = pytest.importorskip("PIL.Image")
    ours, theirs = both(folders("sd1"), torch.float32, diffusers.StableDiffusionInpaintPipeline)
    pixels = torch.randint(0, 256, (33, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.frombytes("RGB", (50, 33), bytes(pixels.flatten().tolist()))
    mask = Image.new("L", (50, 33))
    mask.paste(255, (10, 10, 30, 20))
    call = dict(prompt="goji", image=picture, mask_image=mask, num_inference_steps=3, height=24, width=40)
    agree(run(ours, **call), run(theirs, **call), torch.float32)
    a = ours(**call, generator=torch.Generator().manual_seed(0)).images
    b = theirs(**call, generator=torch.Generator().manual_seed(0)).images
    assert a[0].size == b[0].size == (40, 24) and a[0].mode == "RGB"
    assert max(abs(u - v) for u, v in zip(a[0].tobytes(), b[0].tobytes(), strict=True)) <= 1


def test_lists_of_generators(folders):
    ours, theirs = both(folders("sd1"), torch.float64)
    results = []
    for pipe in (ours, theirs):
        generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
        call = dict(prompt="goji", num_images_per_prompt=2, num_inference_steps=3, eta=1.0)
        results.append(pipe(generator=generators, output_type="latent", **call).images)
    assert (results[0] - results[1]).abs().max() <= 1e-10
    alone = ours(prompt="goji", num_inference_steps=3, generator=torch.Generator().manual_seed(6),
                 output_type="latent")
    assert torch.allclose(alone.images[0], results[0][1], atol=1e-8)  # a picture does not depend on its batch


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_u_turn(folders, tmp_path, name):
    """Read, written by us, and read by diffusers: the same picture."""
    ours, theirs = both(folders(name), torch.float64)
    ours.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    call = dict(prompt="a herb shop", num_inference_steps=3)
    read_back = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    for pipe in (again, read_back):
        agree(run(pipe, **call), run(theirs, **call), torch.float64)


def test_flax_names(folders, tmp_path):
    """model_index.json written by the JAX port names the same classes."""
    import json
    import shutil

    shutil.copytree(folders("sd1"), tmp_path / "flax")
    index = json.loads((tmp_path / "flax" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlaxPNDMScheduler"]
    index["unet"] = ["diffusers", "FlaxUNet2DConditionModel"]
    (tmp_path / "flax" / "model_index.json").write_text(json.dumps(index))
    flax = StableDiffusionPipeline.from_pretrained(tmp_path / "flax")
    assert type(flax.scheduler).__name__ == "PNDMScheduler"


def test_single_file(tmp_path):
    """A complete SD 1 file in the original layout: diffusers (given the configs) and we draw the same from
    it."""
    from tests.test_minidiff_pipeline import make, single_file

    pipe = make()
    single_file(pipe, tmp_path / "model.safetensors")
    pipe.scheduler = samplers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True)
    pipe.save_pretrained(tmp_path / "configs")
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "configs"), local_files_only=True,
        safety_checker=None
    )
    theirs.set_progress_bar_config(disable=True)
    ours = StableDiffusionPipeline.from_single_file(tmp_path / "model.safetensors",
                                                    tmp_path / "configs" / "tokenizer")
    call = dict(prompt="a herb shop", num_inference_steps=4, height=16, width=16)
    agree(run(ours, **call), run(theirs, **call), torch.float32)

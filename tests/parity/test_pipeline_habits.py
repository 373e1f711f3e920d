"""The pipeline's arguments that are only habits, beside diffusers'; and slices that diffusers' own tests pin.

Models have upstream's small test configurations and first weights, each library building its own from one
seed. The tokenizer of those tests is on a hub, so the prompts are other ids here: of the pinned slices, those
of LCM do not feel it within their own tolerance of 0.01; the others are compared with diffusers run beside.
"""

import logging

import numpy as np
import pytest
import torch

import miniclip
import minidiff
from miniclip.tokenizer import CLIPTokenizer
from tests.test_lora import teach
from train.lora import add_lora, save_lora

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "A painting of a squirrel eating a burger"
TOKENIZER = CLIPTokenizer.train([PROMPT, "this is a negative prompt"] * 9, vocab_size=700)
SD_UNET = {"block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 32, "norm_num_groups": 2,
           "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8,
           "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
XL_UNET = {**SD_UNET, "block_out_channels": (2, 4), "layers_per_block": 2, "attention_head_dim": (2, 4),
           "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
           "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 80,
           "cross_attention_dim": 64, "norm_num_groups": 1}
SD_VAE = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4,
          "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
XL_VAE = {**SD_VAE, "block_out_channels": (32, 64), "norm_num_groups": 32, "sample_size": 128}
TEXT = {"bos_token_id": 0, "eos_token_id": 2, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 1000,
        "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 1}
XL_TEXT = {**TEXT, "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4,
           "num_hidden_layers": 5, "hidden_act": "gelu", "projection_dim": 32}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# of diffusers' test_stable_diffusion.py and test_stable_diffusion_xl.py
PINNED = {
    False: [0.2368, 0.4900, 0.5019, 0.2723, 0.4473, 0.4578, 0.4551, 0.3532, 0.4133],
    True: [0.4917, 0.6555, 0.4348, 0.5219, 0.7324, 0.4855, 0.5168, 0.5447, 0.5156],
}


def build(models, texts, tokenizer, xl: bool, lcm: bool = False):
    """A pipeline of one library's classes, from one seed for each part, as upstream's tests build theirs."""
    more = {"time_cond_proj_dim": 256} if lcm else {}
    torch.manual_seed(0)
    unet = models.UNet2DConditionModel(**{**(XL_UNET if xl else SD_UNET), **more})
    torch.manual_seed(0)
    vae = models.AutoencoderKL(**(XL_VAE if xl else SD_VAE))
    torch.manual_seed(0)
    config = texts.CLIPTextConfig(**(XL_TEXT if xl else TEXT))
    parts = {"unet": unet, "vae": vae, "text_encoder": texts.CLIPTextModel(config), "tokenizer": tokenizer,
             "feature_extractor": None, "image_encoder": None}
    if xl:
        parts |= {"text_encoder_2": texts.CLIPTextModelWithProjection(config), "tokenizer_2": tokenizer}
        scheduler = models.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    else:
        parts |= {"safety_checker": None}
        scheduler = models.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    pipe = getattr(models, "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline")(
        **parts, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    ours = build(minidiff, miniclip, TOKENIZER, request.param)
    theirs = build(diffusers, transformers, transformers.CLIPTokenizer.from_pretrained(folder), request.param)
    return ours, theirs


def draw(pipe, seed=0, **kwargs):
    call = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "np", **kwargs}
    return pipe(generator=torch.Generator().manual_seed(seed), **call)[0]


def assert_same(ours, theirs, **call) -> None:
    a, b = draw(ours, **call), draw(theirs, **call)
    assert a.shape == b.shape and np.abs(a - b).max() <= 1e-5


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("walk", [{}, {"timesteps": [999, 499]}])
def test_the_slices_that_diffusers_pins(xl: bool, walk: dict) -> None:
    pipe = build(minidiff, miniclip, TOKENIZER, xl, lcm=True)
    pipe.scheduler = minidiff.LCMScheduler.from_config(pipe.scheduler.config)
    picture = draw(pipe, **{"num_inference_steps": 2, "guidance_scale": 5.0 if xl else 6.0, **walk})
    assert np.abs(picture[0, -3:, -3:, -1].flatten() - PINNED[xl]).max() < 1e-2


SAMPLERS = ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler", "DDPMScheduler"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_libraries_from_one_seed(both, name: str) -> None:
    ours, theirs = both
    kept = ours.scheduler, theirs.scheduler
    for pipe, library in ((ours, minidiff), (theirs, diffusers)):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config, skip_prk_steps=True)
    for call in ({}, {"negative_prompt": "this is a negative prompt"}, {"height": 72, "width": 56},
                 {"prompt": [PROMPT] * 2, "num_images_per_prompt": 2}):
        assert_same(ours, theirs, **call)
    ours.scheduler, theirs.scheduler = kept


def test_encoded_prompts(both) -> None:
    ours, theirs = both
    for call in ({"negative_prompt": "this is a negative prompt"}, {}, {"num_images_per_prompt": 2}):
        call = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "device": "cpu", **call}
        a, b = (pipe.encode_prompt(PROMPT, **call) for pipe in (ours, theirs))
        assert len(a) == len(b)
        assert all((x - y).abs().max() <= 2e-6 for x, y in zip(a, b, strict=True))
    names = [f"{sign}{kind}_embeds" for kind in ("prompt", "pooled_prompt") for sign in ("", "negative_")]
    given = dict(zip(names, a, strict=False))
    assert_same(ours, theirs, prompt=None, **given)
    assert_same(ours, theirs, prompt=None, **{k: v for k, v in given.items() if "negative" not in k})


def test_walks(both) -> None:
    ours, theirs = both
    sigmas = [14.0, 3.0, 0.5, 0.0]
    kept = ours.scheduler, theirs.scheduler
    for pipe, library in ((ours, minidiff), (theirs, diffusers)):
        pipe.scheduler = library.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert_same(ours, theirs, sigmas=sigmas, num_inference_steps=None)
    assert_same(ours, theirs, timesteps=[900, 400, 20], num_inference_steps=None)
    ours.scheduler, theirs.scheduler = kept


def test_a_sampler_of_diffusers_in_our_pipeline(both) -> None:
    ours, theirs = both
    kept = ours.scheduler, theirs.scheduler
    for name in (*SAMPLERS, "LMSDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"):
        for pipe in (ours, theirs):
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, skip_prk_steps=True)
        assert_same(ours, theirs, num_inference_steps=4)
    early = diffusers.DDIMScheduler(**BETAS)            # mended by either constructor
    parts = {k: v for k, v in ours.components.items() if v is not None}
    mended = minidiff.StableDiffusionPipeline(**{**parts, "scheduler": early}).scheduler
    assert ours.is_xl or (mended.config.steps_offset == 1 and not mended.config.clip_sample)
    ours.scheduler, theirs.scheduler = kept


def test_callbacks_see_the_same(both) -> None:
    ours, theirs = both
    names = theirs._callback_tensor_inputs
    assert set(names) <= set(ours._callback_tensor_inputs)
    seen = []

    def look(pipe, i, t, values):
        seen.append({name: value.clone() for name, value in values.items()})
        pipe._guidance_scale += 1.0
        return {"latents": values["latents"] * 0.9}

    assert_same(ours, theirs, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names,
                num_inference_steps=3)
    for mine, other in zip(seen[:3], seen[3:], strict=True):
        for name in names:
            if mine[name].shape == other[name].shape:
                assert (mine[name] - other[name]).abs().max() <= 2e-5, name
    assert ours.guidance_scale == theirs.guidance_scale == 9.0


def test_sdxl_alone(both) -> None:
    ours, theirs = both
    if not ours.is_xl:
        return
    assert_same(ours, theirs, negative_original_size=(512, 512), negative_target_size=(1024, 1024),
                negative_crops_coords_top_left=(3, 4))
    halves = [draw(pipe, num_inference_steps=10, denoising_end=0.7, output_type="latent")
              for pipe in (ours, theirs)]
    assert (halves[0] - halves[1]).abs().max() <= 2e-5
    img2img = diffusers.StableDiffusionXLImg2ImgPipeline(**theirs.components)
    img2img.set_progress_bar_config(disable=True)
    assert_same(ours, img2img, image=halves[1], num_inference_steps=10, denoising_start=0.7)


def test_arrays_as_images(both) -> None:
    ours, theirs = both
    kind = f"StableDiffusion{'XL' * ours.is_xl}Img2ImgPipeline"
    img2img = getattr(diffusers, kind)(**theirs.components)
    img2img.set_progress_bar_config(disable=True)
    array = np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32)
    for image in (array, [array[0]], torch.from_numpy(array).permute(0, 3, 1, 2), torch.randn(1, 4, 32, 32)):
        assert_same(ours, img2img, image=image, strength=0.7, num_inference_steps=5)


def test_lora_files(both, tmp_path) -> None:
    pytest.importorskip("peft")
    ours, theirs = both
    before = draw(ours)
    add_lora(ours.unet, rank=2, alpha=4)
    teach(ours.unet)
    save_lora(ours.unet, tmp_path / "pytorch_lora_weights.safetensors")
    for name, layer in list(ours.unet.named_modules()):
        if hasattr(layer, "lora_A"):
            minidiff.lora.set_submodule(ours.unet, name, layer.base())
    assert np.abs(draw(ours) - before).max() <= 1e-5
    for pipe in (ours, theirs):
        pipe.load_lora_weights(tmp_path, adapter_name="ink")
    assert np.abs(draw(ours) - before).max() > 1e-3
    for scale in (1.0, 0.3, 0.0):
        assert_same(ours, theirs, cross_attention_kwargs={"scale": scale})
    for pipe in (ours, theirs):
        pipe.set_adapters("ink", 0.5)
    assert_same(ours, theirs)
    assert ours.get_active_adapters() == theirs.get_active_adapters()
    for pipe in (ours, theirs):
        pipe.fuse_lora(lora_scale=0.6)
        pipe.unload_lora_weights()
    assert_same(ours, theirs)
    assert np.abs(draw(ours) - before).max() > 1e-4

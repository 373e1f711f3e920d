"""Fine-tuning SDXL and models for inpainting beside diffusers: one batch's loss and gradients,
and the LoRA file of a run.

What is held against ours is written as in diffusers' examples/text_to_image/train_text_to_image_sdxl.py and
examples/research_projects/dreambooth_inpaint/train_dreambooth_inpaint.py, with diffusers' and transformers'
own models.
Two things differ by intent: a picture's latents are the mean of the VAE's Gaussian,
where upstream draws from it; and SDXL's empty caption is zeros where the model says so, as its pipeline has
it, where upstream's script encodes "".
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.lora import FILE
from minidiff.pipeline import StableDiffusionPipeline
from tests.parity.compare import assert_same_keys, relative_error
from tests.test_latent import (  # noqa: F401  fixtures among them
    CAPTIONS,
    KINDS,
    data,
    models,
    pictures,
    short_validation,
    train,
    writer_of,
)
from tests.test_minidiff_pipeline import make

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = {"text_encoder": transformers.CLIPTextModel,
         "text_encoder_2": transformers.CLIPTextModelWithProjection}
T = torch.tensor([3, 250, 600, 990])


class Theirs:
    """A model folder in diffusers' and transformers' hands, in float64."""

    def __init__(self, folder: Path):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").double().train()
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").double()
        self.schedule = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
        self.encoders = [cls.from_pretrained(folder / name).double()
                         for name, cls in TEXTS.items() if (folder / name).exists()]
        self.tokenizers = [transformers.CLIPTokenizer.from_pretrained(folder / name)
                           for name in ("tokenizer", "tokenizer_2") if (folder / name).exists()]

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> tuple[Tensor, dict | None]:
        outputs = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length,
                            truncation=True, return_tensors="pt").input_ids
            outputs.append(encoder(ids, output_hidden_states=True))
        if len(outputs) == 1:
            return outputs[0].last_hidden_state, None
        sizes = torch.tensor([[16, 16] + [0, 0] + [16, 16]], dtype=torch.float64).repeat(len(prompts), 1)
        both = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return both, {"text_embeds": outputs[1].text_embeds, "time_ids": sizes}

    def loss(self, x0: Tensor, prompts: list[str], noise: Tensor, beside: list[Tensor]) -> Tensor:
        text, added = self.texts(prompts)
        noisy = torch.cat([self.schedule.add_noise(x0, noise, T), *beside], dim=1)
        return F.mse_loss(self.unet(noisy, T, text, added_cond_kwargs=added).sample, noise)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, bar: float = 5e-11) -> None:
    scale = max(p.grad.abs().max() for p in theirs.parameters())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max() / torch.maximum(q.grad.abs().max(), 1e-3 * scale)
        assert error <= bar, f"gradient of {name} differs by {error:.1e}"


@pytest.mark.parametrize("kind", ["sd", *KINDS])
@pytest.mark.parametrize("zeros", [True, False])
def test_loss_and_gradients(tmp_path: Path, data: Path, kind: str, zeros: bool) -> None:  # noqa: F811
    pipe = make(**KINDS.get(kind, {}))
    pipe.force_zeros_for_empty_prompt = zeros
    pipe.save_pretrained(tmp_path / "model")
    theirs, (ours, latents) = Theirs(tmp_path / "model"), writer_of(tmp_path / "model", data, tmp_path,
                                                                    torch.float64)
    assert_same_keys(ours.unet, theirs.unet)
    pixels = pictures(data).double()
    x0 = theirs.latents(pixels)
    assert relative_error(latents, x0) <= 1e-12
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    around, beside = {}, []
    if ours.inpaints:
        mask = torch.zeros(4, 1, 16, 16, dtype=torch.float64)
        mask[0], mask[1, :, 3:9, 5:], mask[2, :, :4, :4], mask[3, :, 7:, 2:11] = 1, 1, 1, 1
        around = {"inpaint": ours.mask_and_latents(pixels, mask)}
        beside = [F.interpolate(mask, size=(8, 8)), theirs.latents(pixels * (mask < 0.5))]
    prompts = CAPTIONS if zeros else ["", *CAPTIONS[1:]]
    theirs_loss, ours_loss = theirs.loss(x0, prompts, noise, beside), ours(x0, prompts, T, noise, around)
    assert relative_error(ours_loss, theirs_loss) <= 1e-12
    theirs_loss.backward()
    ours_loss.backward()
    assert_same_gradients(ours.unet, theirs.unet)


@pytest.mark.parametrize("kind", ["xl", "xl-inpaint"])
def test_diffusers_reads_the_lora_file_of_a_run(
        tmp_path: Path, models: Path, data: Path, kind: str) -> None:  # noqa: F811
    pytest.importorskip("peft")
    run = train(models / kind, data, tmp_path, lora=2, lora_alpha=6.0, lr=0.05, steps=3)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(models / kind)
    ours = StableDiffusionPipeline.from_pretrained(run / "model").unet
    generator = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(2, *shape, generator=generator)
                       for shape in ((ours.config.in_channels, 8, 8), (5, 64), (32,)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 2)}

    def answer(unet: nn.Module) -> Tensor:
        with torch.no_grad():
            return unet(x, 300, text, added_cond_kwargs=added).sample

    before = answer(theirs.unet)
    theirs.load_lora_weights(run / "lora", weight_name=FILE)
    assert torch.allclose(answer(theirs.unet), answer(ours), atol=1e-5)
    assert not torch.allclose(before, answer(ours), atol=1e-3)


@pytest.mark.parametrize("kind,name", [("xl", "StableDiffusionXLPipeline"),
                                       ("inpaint", "StableDiffusionInpaintPipeline"),
                                       ("xl-inpaint", "StableDiffusionXLInpaintPipeline")])
def test_diffusers_opens_the_model_of_a_run(tmp_path: Path, models: Path, data: Path, kind: str,  # noqa: F811
                                            name: str) -> None:
    run = train(models / kind, data, tmp_path)
    ours = StableDiffusionPipeline.from_pretrained(run / "model")
    theirs = getattr(diffusers, name).from_pretrained(run / "model")
    theirs.set_progress_bar_config(disable=True)
    paint = {} if kind == "xl" else {"image": pictures(data)[:1] / 2 + 0.5,
                                     "mask_image": torch.ones(1, 1, 16, 16),
                                     "strength": 1.0}
    ours_x, theirs_x = (pipe("a herb", num_inference_steps=2, guidance_scale=5.0, height=16, width=16,
                             output_type="pt", generator=torch.Generator().manual_seed(0), **paint).images
                             for pipe in (ours, theirs))
    assert torch.allclose(ours_x, theirs_x, atol=1e-4)

"""eps, v, x0 and flow: one conversion in minidiff/schedule.py,
and training that aims at what the model predicts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minidiff import DDIMScheduler, DDPMScheduler, LCMScheduler
from minidiff.schedule import to_eps, to_x0, to_x0_unscaled, training_target
from minidiff.text_to_image import ImageFormat, Preset, TextToImage, build_text_to_image
from train import validation

KINDS = ("epsilon", "v_prediction", "sample")
TINY = Preset((8, 16), (False, True), 1, 32, 1)


def known(seed: int = 0) -> tuple[Tensor, Tensor]:
    """x0 and eps, float64 [3, 2, 4, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("kind", [*KINDS, "flow_prediction"])
@pytest.mark.parametrize("sigma", [0.05, 0.6, 0.95])
def test_each_prediction_gives_back_x0_and_eps(kind: str, sigma: float) -> None:
    x0, eps = known()
    alpha = 1 - sigma if kind == "flow_prediction" else (1 - sigma**2) ** 0.5
    x_t = alpha * x0 + sigma * eps
    output = training_target(kind, x0, eps, alpha, sigma)
    assert (to_x0(kind, output, x_t, alpha, sigma) - x0).abs().max() < 1e-12
    assert (to_eps(kind, output, x_t, alpha, sigma) - eps).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_unscaled_form_is_the_same_function(kind: str) -> None:
    x0, eps = known()
    sigma = torch.tensor(1.7, dtype=torch.float64)
    alpha = 1 / (sigma**2 + 1) ** 0.5
    output = training_target(kind, x0, eps, alpha, alpha * sigma)
    assert (to_x0_unscaled(kind, output, x0 + sigma * eps, sigma, sigma) - x0).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [DDPMScheduler, DDIMScheduler, LCMScheduler])
def test_a_sampler_given_the_perfect_prediction_finds_x0(kind: str, sampler: type) -> None:
    x0, eps = known()
    scheduler = sampler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3:4].repeat(len(x0))
    x_t = scheduler.add_noise(x0, eps, t)
    output = scheduler.training_target(x0, eps, t)
    out = scheduler.step(output, int(t[0]), x_t)
    found = scheduler.predict_x0(output, x_t,
                                 int(t[0])) if sampler is LCMScheduler else out.pred_original_sample
    assert (found - x0).abs().max() < 1e-6      # the tables are float32


class Perfect(nn.Module):
    """A model that knows the images and the noise: whatever it is asked to predict, it predicts exactly."""

    def __init__(self, model: TextToImage, x0: Tensor, eps: Tensor):
        super().__init__()
        self.config, self.conv_in = model.unet.config, model.unet.conv_in
        self.scheduler, self.x0, self.eps = model.scheduler, x0, eps

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, added_cond_kwargs: dict | None = None):
        kind = self.scheduler.config.prediction_type
        alpha_bar = self.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        named = {"epsilon": self.eps, "sample": self.x0, "v_prediction": alpha * self.eps - sigma * self.x0}
        return type("Output", (), {"sample": named[kind]})


def perfect_model(kind: str, captions: list[str], x0: Tensor, eps: Tensor) -> TextToImage:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    model = build_text_to_image(TINY, ImageFormat(8, 1, 2), captions, scheduler)
    model.unet = Perfect(model, x0, eps)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_training_aims_at_what_the_model_predicts(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(4, 4, 4, 4, generator=generator), torch.randn(4, 4, 4, 4, generator=generator)
    model, t = perfect_model(kind, ["春", "滿", "乾", "坤"], x0, eps), torch.tensor([10, 300, 700, 990])
    assert model(x0, ["春", "滿", "乾", "坤"], t, eps) < 1e-10
    # and a model that has them mixed up does not pass
    model.unet.eps, model.unet.x0 = model.unet.x0, model.unet.eps
    assert model(x0, ["春", "滿", "乾", "坤"], t, eps) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_validation_measures_x0_whatever_the_model_predicts(kind: str) -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(validation.NOISE_SEED))
    model = perfect_model(kind, ["春"], *(torch.nn.functional.pixel_unshuffle(x, 2) for x in (images, noise)))
    scores = validation.validate(model, images, ["春"] * 4, complete=True)
    assert scores["val"] < 1e-6 and scores["val_free"] < 1e-6

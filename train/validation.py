"""Is a diffusion model learning? Errors on fixed images, timesteps and noise, beside the best possible ones.

Read after train_diffusion.py. Source of the optimal denoiser: Karras 2022, appendix B.3.
Mirrors: nothing upstream.
Shapes: N images, B some of them, L = C*f*f, h = w = S/f, as the UNet sees an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidiff.text_to_image import TextToImage

# fixed, or the numbers would mostly show which timesteps were drawn
TIMESTEPS = (99, 299, 499, 699, 899, 959)
NOISE_SEED = 1
MOST = 64                                   # images that are looked at


@torch.no_grad()
def validate(model: TextToImage, images: Tensor, captions: list[str], complete: bool) -> dict[str, float]:
    """Mean squared errors of the predicted x0, in grey levels from -1 to 1, at fixed timesteps and noise.

    images: as the data holds them. complete: whether they are all that the model is trained on.
    Then `bound` is the error of the best possible predictor without captions: `val_free`,
    without captions, cannot be below it; `val`, with captions, can. A model for inpainting sees each image
    around one of its masks, all masks in turn; it then has no such bound.
    """
    model.eval()
    chosen = torch.arange(min(len(images), MOST))
    noise = torch.randn(images[chosen].shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    x0, eps = model.to_x0(images[chosen]), model.to_x0(noise.to(images.device))
    bounded = complete and model.masks == 1
    errors: dict[str, list[float]] = {"val": [], "val_free": [], **({"bound": []} if bounded else {})}
    for t in TIMESTEPS:
        x_t = model.scheduler.add_noise(x0, eps, torch.full((len(x0),), t))
        if bounded:
            best = optimal_denoiser(x_t, model.to_x0(images), *model.scheduler.signal_and_noise(t))
            errors["bound"].append(mean_squared(best, x0))
        errors["val"].append(mean_squared(predicted_x0(model, x_t, t, captions), x0))
        errors["val_free"].append(mean_squared(predicted_x0(model, x_t, t, [""] * len(x0)), x0))
    model.train()
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    by_time = {f"{name}_{t}": values[i] for name, values in errors.items() for i, t in enumerate(TIMESTEPS)}
    return {**means, **by_time}


def mean_squared(a: Tensor, b: Tensor) -> float:
    """Over batch, channels and pixels alike."""
    return (a - b).square().mean().item()


def predicted_x0(model: TextToImage, x_t: Tensor, t: int, captions: list[str]) -> Tensor:
    """What the model takes for the clean images behind x_t [B, L, h, w], the first ones of the data."""
    predicted = []
    for rows in torch.arange(len(x_t)).split(model.max_batch):
        conditioning = model.conditioning([captions[i]
                                           for i in rows]) | model.inpaint_input(rows, rows % model.masks)
        # a tensor: --compile would compile for each number
        times = torch.full((len(rows),), t, device=x_t.device)
        output = model.predict(x_t[rows], times, conditioning)
        predicted.append(model.scheduler.predict_x0(output, x_t[rows], t))
    return torch.cat(predicted)


def optimal_denoiser(x_t: Tensor, images: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x0 | x_t] for x_t = alpha x0 + sigma eps when x0 is one of the images, each as likely: their mean,
    weighted by likelihood.

    x_t [B, ...], images [N, ...] -> [B, ...]. No network can have a smaller mean squared error on these
    images.
    """
    # [N, D]; MPS has no float64
    flat = images.flatten(1).cpu().double()
    distance = torch.cdist(x_t.flatten(1).cpu().double(), alpha * flat).square()
    weights = torch.softmax(-distance / (2 * sigma**2), dim=1)               # [B, N]
    return (weights @ flat).to(x_t).reshape(x_t.shape)
